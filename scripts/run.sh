#!/usr/bin/env bash
# A long run in the background, with a log to follow; the same command again resumes it.
#
#   bash scripts/run.sh configs/two_phase.py [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
# Memory in large pages: every step takes and frees its buffers, and is 7 % faster on a CPU so.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    echo "error: name a config file: bash scripts/run.sh configs/two_phase.py [--config.key=value ...]" >&2
    exit 2
fi
config=$1
shift
mkdir -p runs
log=runs/$(basename "${config%.*}")-$(date +%Y%m%d-%H%M%S).log
nohup .venv/bin/python -m difflm_jax.train --config="$config" "$@" >"$log" 2>&1 </dev/null &
echo "process $!; follow it with: tail -f $log"
