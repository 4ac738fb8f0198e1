#!/usr/bin/env bash
#SBATCH --job-name=difflm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#
# A training run on SLURM: one process a node, each with all GPUs of its node; jax finds the others by itself.
#
#   sbatch [--nodes=4 ...] scripts/launch/slurm.sh configs/two_phase.py [--config.key=value ...]
#
# output_dir and the project must lie on a file system that every node sees. Two minutes before the time is up SLURM
# sends SIGTERM: the run saves and exits with status 75, and this job puts itself into the queue again, where it resumes
# from that checkpoint. The same happens when a node is lost (from the last checkpoint).
set -euo pipefail

case "${1:---help}" in -h | --help)
    sed -n '12,19s/^# \{0,1\}//p' "$0"
    echo "(slurm.sh)"
    exit 0
    ;;
esac
config=$1
shift
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

status=0
srun --kill-on-bad-exit=1 .venv/bin/python -m difflm_jax.train --config="$config" "$@" || status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
