#!/usr/bin/env bash
#SBATCH --job-name=quantconvert
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --requeue
# One model an array task, of a list with a source and a target on each line:
#   printf '%s\n' 'org/a me/a-int4' 'org/b me/b-int4' > models.txt
#   sbatch --array=0-1 slurm.sh models.txt --bits 4
# A task that is requeued, on whatever node, goes on with what is on the Hub. HF_TOKEN comes from the environment.
set -euo pipefail
list=$1
shift
read -r source target < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list")
cd "${TMPDIR:-/tmp}"
quantconvert "$source" --push-to-hub "$target" --strict --verify --workers "${SLURM_CPUS_PER_TASK:-0}" "$@"
