#!/usr/bin/env bash
# One process of a job step, started by srun: gives it its rank, and notes how it ended where that was not well.
#
# The command runs in the foreground: SLURM signals the whole process group, and bash, which only notes the signal,
# outlives the command. FAILURES is a folder of the job's attempt.
set -uo pipefail
told=no
trap 'told=yes' TERM
trap : USR1
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
"$@"
code=$?
if ((code != 0)); then
  # Written whole: the job's script reads it. The time comes first, so that sorting finds the first failure.
  record="$(date +%s.%N) $SLURM_PROCID ${SLURMD_NODENAME:-$(hostname)} $code $told"
  echo "$record" >"$FAILURES/.$SLURM_PROCID"
  mv "$FAILURES/.$SLURM_PROCID" "$FAILURES/rank-$SLURM_PROCID"
  sleep 2  # srun ends the others when this one ends: what they failed of themselves is written first
fi
[[ $told == no ]] || touch "$FAILURES/told"
exit "$code"
