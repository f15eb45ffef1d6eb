#!/usr/bin/env bash
# The whole chain on the sample world, from raw media to an export, before the real one costs days: every job script,
# stage 1 on text and images, stage 2 in longer windows with video, post-training, generation, conversion.
#
#   examples/slurm/rehearsal.sh FOLDER [--scale tiny|small]
#
# FOLDER is made, on a file system that every node sees. EMU3_CLUSTER names your settings (settings-rehearsal.sh).
# Exit code 0 only if everything that the chain should leave is there.
set -euo pipefail
if (($# == 0)); then
  echo "usage: $0 FOLDER [--scale tiny|small]" >&2
  exit 2
fi
EMU3_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$1"
EMU3_REHEARSAL=$(cd "$1" && pwd)
EMU3_SETTINGS=$EMU3_ROOT/examples/slurm/settings-rehearsal.sh
export EMU3_ROOT EMU3_REHEARSAL EMU3_SETTINGS
shift
# shellcheck source=examples/slurm/settings-rehearsal.sh
source "$EMU3_SETTINGS"

# Prepare or judge, by a job, because this host may lack the software: shows what it printed, sets `number`.
by_job() {  # ACTION [arguments]
  local code=0 name=rehearsal-$1
  number=$("$EMU3_ROOT/examples/slurm/submit.sh" rehearsal --job-name="$name" --wait -- "$1" "$EMU3_REHEARSAL" "${@:2}") ||
    code=$?
  number=${number%%;*}
  if ((code == 0)); then cat "$LOGS/$name-$number"/attempt-*/rank-0.log; else cat "$LOGS/$name-$number.log"; fi
  return "$code"
}

by_job prepare --ranks "$((NODES * TASKS_PER_NODE))" "$@"
echo "rehearsal-prepare $number" | tee "$EMU3_REHEARSAL/jobs.txt"
"$EMU3_ROOT/examples/slurm/chain.sh" curate select vision tokenize plan stage1 stage2 quality understanding1 understanding2 \
  candidates score pairs dpo generate convert | tee --append "$EMU3_REHEARSAL/jobs.txt"

# Wait for the end of all, and keep what became of each: SLURM forgets jobs after minutes.
declare -A names=() ends=()
while read -r name number; do names[$number]=$name; done <"$EMU3_REHEARSAL/jobs.txt"
numbers=$(printf '%s,' "${!names[@]}")
misses=0
while ((misses < 20)); do
  going=0
  if listed=$(squeue --states=all --noheader --jobs="${numbers%,}" --format='%i %T %M' 2>/dev/null); then
    misses=0
  else
    misses=$((misses + 1))
  fi
  while read -r number state elapsed; do
    case $state in
      COMPLETED | FAILED | CANCELLED | TIMEOUT | OUT_OF_MEMORY | BOOT_FAIL | DEADLINE)
        ends[$number]="$state $elapsed" ;;
      NODE_FAIL | PREEMPTED) # SLURM starts it again; where it does not, it forgets the job
        ends[$number]="$state $elapsed" going=1 ;;
      ?*) going=1 ;;
    esac
  done <<<"$listed"
  ((going || misses)) || break
  sleep 3
done
for number in $(printf '%s\n' "${!ends[@]}" | sort --version-sort); do
  echo "${names[${number%%_*}]} $number ${ends[$number]}"
done
by_job judge
