#!/bin/bash
#SBATCH --job-name='a name; $(touch pwned) `touch pwned` '"'"'x'"'"' "y" #z\'
#SBATCH --partition=gpu
#SBATCH --account='team a'
#SBATCH --qos=long
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=2-00:00:00
#SBATCH --signal=B:USR1@420
#SBATCH --output='/data/my runs/100%%/demo/logs/%j.batch.log'
#SBATCH --open-mode=append
#SBATCH --exclude=n7,n9
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --mail-type=END

# /data/my runs/100%/demo: 4 × 8 ranks, 1 spare. Written by `megahybrid launch submit`, site big, commit 0123456789ab.
# What comes after a stop, a failure or a hang is decided by launch/supervise.py.
set -eo pipefail
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
ulimit -c 0
type module >/dev/null 2>&1 || . /etc/profile || true
module load cuda/12.8
module load 'x; touch pwned'
export NCCL_SOCKET_IFNAME=ib0
export NOTE='$(touch pwned)'
cd '/home/me/mega hybrid'
source .venv/bin/activate
# Slurm signals this shell alone.
trap 'kill -USR1 "$supervisor" || true' USR1
trap 'kill -TERM "$supervisor" || true' TERM
python -m launch.supervise '/data/my runs/100%/demo/slurm/job.json' &
supervisor=$!
while true; do
  wait "$supervisor" && code=0 || code=$?
  kill -0 "$supervisor" 2>/dev/null || break
done
decided='/data/my runs/100%/demo/logs'/"$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}/decided"
if [ "$code" -gt 128 ] && [ ! -e "$decided" ]; then
  echo "the batch process was killed (code $code): back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
