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
#SBATCH --export=NONE
#SBATCH --chdir='/home/me/mega hybrid'
#SBATCH --signal=B:USR1@420
#SBATCH --output='/data/my runs/100%%/demo/logs/%j.batch.log'
#SBATCH --open-mode=append
#SBATCH --exclude=n7,n9
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --mail-type=END

# /data/my runs/100%/demo: 4 × 8 ranks, 1 spare. Written by `megahybrid launch submit`, site big, commit 0123456789ab.
# What comes after a stop, a failure or a hang is decided by launch/supervise.py. This
# shell hands signals on to it; where nobody decided (it was killed, or this node could
# not start it) the job goes back into the queue, three times in a row at most.
logs='/data/my runs/100%/demo/logs'
undecided='/data/my runs/100%/demo/slurm/undecided'
attempt=$logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
task=${task:-$SLURM_JOB_ID}
supervisor= starting= ended=
hand_on() {
  # A process that does not listen yet looks for the file.
  : 2>/dev/null >"$attempt/$1" || true
  [ -z "$supervisor" ] || kill "-$1" "$supervisor" || true
}
put_back_preempted() {
  # Where Slurm preempts by a cancel, and at once, nobody else does.
  fields=" $(scontrol -o show job "$task") " || return
  when=${fields#* PreemptTime=} began=${fields#* StartTime=}
  when=${when%% *} began=${began%% *}
  case $fields in *" JobState=PENDING "*) return ;; esac
  case $fields in *" Restarts=${SLURM_RESTART_COUNT:-0} "*) ;; *) return ;; esac
  case $when in [0-9]*) ;; *) return ;; esac
  [[ $when < $began ]] || scontrol requeue "$task"  # else it was an earlier start of the job
}
finish() {
  code=$?
  set +e
  trap '' USR1 TERM  # a requeue ends what is left of this shell
  case $code in 0|2|74) return ;; esac
  if [ -e "$attempt/decided" ]; then return; fi
  if [ -n "$ended" ]; then put_back_preempted; return; fi
  why="the batch process on $SLURMD_NODENAME ended with $code and decided nothing"
  [ -e "$attempt/began" ] ||
    why="the batch process could not be started on $SLURMD_NODENAME (code $code)"
  echo "$why"
  if echo "$why" >>"$undecided"; then
    times=$(wc -l <"$undecided")
  else
    times=$((${SLURM_RESTART_COUNT:-0} + 1))
  fi
  [ "$times" -le 3 ] || return
  scontrol requeue "$task" || { sleep 60; scontrol requeue "$task"; }
  if [ ! -e "$attempt/began" ]; then
    # Beside the nodes that the job was kept off before.
    others=$(scontrol -o show job "$task" | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p')
    scontrol update "JobId=$task" "ExcNodeList=${others:+$others,}$SLURMD_NODENAME"
  fi
}
trap finish EXIT
trap 'hand_on USR1' USR1
trap 'ended=1; hand_on TERM; [ -n "$starting" ] || exit 143' TERM
mkdir "$attempt" 2>/dev/null || true
set -eo pipefail
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
ulimit -c 0
type module >/dev/null 2>&1 || . /etc/profile || true
[ -n "$HOME" ] || export HOME=~
unset SLURM_EXPORT_ENV SLURM_GET_USER_ENV
export PATH='/home/me/mega hybrid/.venv/bin':"${PATH:-/usr/local/bin:/usr/bin:/bin}":/opt/slurm/bin
export PYTHONPATH='/home/me/mega hybrid'
module load cuda/12.8
module load 'x; touch pwned'
export NCCL_SOCKET_IFNAME=ib0
export NOTE='$(touch pwned)'
cd '/home/me/mega hybrid'
source .venv/bin/activate
starting=1
(trap '' USR1 TERM; exec python -m megahybrid.launch.supervise '/data/my runs/100%/demo/slurm/job.json') &
supervisor=$!
while true; do
  wait "$supervisor" && code=0 || code=$?
  kill -0 "$supervisor" 2>/dev/null || exit "$code"
done
