#!/usr/bin/env bash
# A training run on every host of a Cloud TPU pod slice; jax finds the others by itself.
#
#   bash scripts/launch/tpu_pod.sh NAME ZONE configs/two_phase.py --config.output_dir=/mnt/shared/run [--config.key=...]
#
# NAME is a TPU VM that exists (gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-16
# --version=v2-alpha-tpuv5-lite). The project must lie in ~/difflm on every host, and output_dir on storage that all
# hosts share (Filestore, or a bucket mounted with Cloud Storage FUSE). For a preempted slice make it again and give the
# same command: the run resumes from its last checkpoint. This file is tpu_pod.sh.
set -euo pipefail

case "${1:---help}" in -h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
if [ $# -lt 3 ]; then
    echo "error: name the TPU, its zone and a config file (see --help)" >&2
    exit 2
fi
name=$1 zone=$2 config=$3
shift 3
arguments=$(printf ' %q' "$@")

run() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}
run "cd ~/difflm && bash scripts/setup.sh --tpu"
# One SIGTERM to each host saves and ends the run with status 75; here the loop starts it again.
run "cd ~/difflm && status=75 && while [ \$status -eq 75 ]; do status=0
    .venv/bin/python -m difflm_jax.train --config=$(printf '%q' "$config")$arguments || status=\$?
done; exit \$status"
