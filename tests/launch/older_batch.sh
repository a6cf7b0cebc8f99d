#!/bin/bash
#SBATCH --job-name=demo
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=0:30:00
#SBATCH --signal=B:USR1@60
#SBATCH --output='@RUN@/logs/%j.batch.log'
#SBATCH --open-mode=append
#SBATCH --requeue

# As `megahybrid launch submit` wrote it before jobs had an environment of their own.
logs='@RUN@/logs'
undecided='@RUN@/slurm/undecided'
excluded=
decided=$logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}/decided
supervisor= ended=
finish() {
  code=$?
  trap '' USR1 TERM  # a requeue ends what is left of this shell
  case $code in 0|2) return ;; esac
  if [ -z "$ended" ] && [ ! -e "$decided" ]; then
    why="the batch process on $SLURMD_NODENAME ended with $code and decided nothing"
    echo "$why" | tee -a "$undecided"
    if [ "$(wc -l <"$undecided")" -le 3 ]; then
      scontrol requeue "$SLURM_JOB_ID" || { sleep 60; scontrol requeue "$SLURM_JOB_ID"; }
      [ -n "$supervisor" ] ||
        scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded$SLURMD_NODENAME"
    fi
  fi
}
trap finish EXIT
trap '[ -z "$supervisor" ] || kill -USR1 "$supervisor" || true' USR1
trap 'ended=1; [ -n "$supervisor" ] || exit 143; kill -TERM "$supervisor" || true' TERM
set -eo pipefail
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
ulimit -c 0
export MASTER_ADDR=127.0.0.1
export PRETEND_STEPS=40
export PRETEND_SAVE=0.1
cd '@WORK@'
(trap '' USR1 TERM; exec @PYTHON@ -m launch.supervise '@RUN@/slurm/job.json') &
supervisor=$!
while true; do
  wait "$supervisor" && code=0 || code=$?
  kill -0 "$supervisor" 2>/dev/null || exit "$code"
done
