#!/usr/bin/env bash
# From nothing to a masked-diffusion language model that answers questions it never saw, on a CPU, in minutes.
# Arguments are passed on to the training command, e.g. --config.attention=full --config.output_dir=runs/full.
set -euo pipefail
cd "$(dirname "$0")/.."
# Memory in large pages: every step takes and frees its buffers, and is 7 % faster on a CPU so.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

[ -f .venv/complete ] || bash scripts/setup.sh
bash scripts/fetch_smollm2.sh
.venv/bin/python -m difflm_jax.train --config=configs/quickstart.py "$@"
