#!/usr/bin/env bash
# Makes the Python environment .venv with the exact versions that were tested (scripts/constraints.txt).
#
#   bash scripts/setup.sh [--update] [--cuda | --tpu] [--test]
#
#   --update   reinstall into an existing environment
#   --cuda     JAX for NVIDIA GPUs        --tpu   JAX for Cloud TPUs        (default: CPU)
#   --test     what the tests need besides: PyTorch, peft and transformers as oracles, ruff, import-linter
#
# PYTHON names the interpreter (3.11 or newer; default python3).
set -euo pipefail
cd "$(dirname "$0")/.."

update=false extras=()
for argument in "$@"; do
    case "$argument" in
        --update) update=true ;;
        --cuda | --tpu | --test) extras+=("${argument#--}") ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: $argument: unknown option (see --help)" >&2; exit 2 ;;
    esac
done

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is older than Python 3.11: name a newer one with PYTHON=..." >&2
    exit 1
fi

if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv
elif [ "$update" = false ] && [ -f .venv/complete ] && [ "$(cat .venv/complete)" = "${extras[*]-}" ]; then
    echo ".venv is there already (--update reinstalls it)"
    exit 0
fi
rm -f .venv/complete

# Modules are compiled when they are imported: all of them at once takes longer than to install them. Some containers
# forbid Python to keep what it compiled: every start of every command would then be ten seconds later.
unset PYTHONDONTWRITEBYTECODE
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint scripts/constraints.txt)
case " ${extras[*]-} " in *" test "*)
    "${pip[@]}" torch==2.13.0 # first, so that nothing else chooses another build of it
    ;;
esac
joined=$(IFS=,; echo "${extras[*]-}")
"${pip[@]}" --editable ".${joined:+[$joined]}"
.venv/bin/python -c "import difflm_jax.train"
echo "${extras[*]-}" >.venv/complete
echo "environment ready: source .venv/bin/activate"
