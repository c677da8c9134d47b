#!/usr/bin/env bash
# Train under Slurm, and go on by itself after a preemption or at the time limit:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=24:00:00 scripts/launch_slurm.sh recipes/X.yaml [section.key=value ...]
#
# One task a GPU. Slurm sends SIGUSR1 to every task two minutes before the end (raise the number below if a step and a save take longer,
# docs/operations.md); the run then saves, all ranks exit with 75, and the job is put into the queue again under its own number. A fault
# (exit code 1) or a mistake in the recipe (2) ends the job: requeueing would only repeat it.
#SBATCH --job-name=burnish
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=USR1@120
set -uo pipefail

[ $# -ge 1 ] || { sed -n '2,9p' "$0" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

# srun gives each task its rank; training/distributed.py reads it. Where one fails, the watchdogs of the others end them, so that the exit
# code is the first one's; killing them would make it 137.
srun --kill-on-bad-exit=0 "$PYTHON" train.py "$@"
code=$?
if [ "$code" -eq 75 ]; then
  echo "stopped on request; putting job ${SLURM_JOB_ID:-} into the queue again"
  if [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
