#!/usr/bin/env bash
# Submit one job with the options that the settings give it; prints the job's number.
#
#   examples/slurm/submit.sh JOB [options of sbatch] [-- arguments of the job]
#
#   examples/slurm/submit.sh stage1 -- --trainer.steps 50
#   examples/slurm/submit.sh tokenize --array=0-15 -- images     # 16 workers, whatever the settings say
#   examples/slurm/submit.sh tokenize --array=3,7 -- images      # two of the settings' workers again
set -euo pipefail
EMU3_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$EMU3_ROOT/examples/slurm
EMU3_SETTINGS=${EMU3_SETTINGS:-$here/settings.sh}
export EMU3_ROOT EMU3_SETTINGS

job=${1:-}
if [[ ! -f $here/$job.sbatch ]]; then
  names=("$here"/*.sbatch)
  names=("${names[@]##*/}")
  echo "error: '$job' is not a job; the jobs are: ${names[*]%.sbatch}" >&2
  exit 2
fi
shift
if [[ ! -f $EMU3_SETTINGS ]]; then
  echo "error: EMU3_SETTINGS=$EMU3_SETTINGS does not exist; copy examples/slurm/settings.sh there" >&2
  exit 2
fi
# shellcheck source=examples/slurm/settings.sh
source "$EMU3_SETTINGS"

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
(($# == 0)) || shift

given=(--parsable --chdir="$WORK" --time="$TIME_LIMIT" --signal="B:USR1@$SIGNAL_SECONDS" --cpus-per-task="$CPUS_PER_TASK")
[[ -z $PARTITION ]] || given+=(--partition="$PARTITION")
[[ -z $ACCOUNT ]] || given+=(--account="$ACCOUNT")
# The workers of an array: as many as a range from 0 has, where one is given; else as the settings say, of which any
# other --array names some.
workers() {  # NUMBER in the settings
  local place asked=''
  for place in "${!options[@]}"; do
    case ${options[place]} in
      --array=*) asked=${options[place]#*=} ;;
      --array | -a) asked=${options[place + 1]:-} ;;
      -a*) asked=${options[place]#-a} ;;
    esac
  done
  if [[ $asked =~ ^0-([0-9]+)(%[0-9]+)?$ ]]; then echo "$((BASH_REMATCH[1] + 1))"; else echo "$1"; fi
}
array() {  # NUMBER of tasks on one device each
  EMU3_WORKERS=$(workers "$1")
  export EMU3_WORKERS
  given+=(--array="0-$(($1 - 1))" --output="$LOGS/%x-%A_%a.log" --nodes=1 --ntasks-per-node=1)
  ((GPUS_PER_NODE == 0)) || given+=(--gpus-per-node=1)
}
unset EMU3_WORKERS
case $job in
  curate) array "$CURATE_WORKERS" ;;
  tokenize) array "$TOKENIZE_WORKERS" ;;
  generate) array "$GENERATE_WORKERS" ;;
  candidates) array "$CANDIDATES_WORKERS" ;;
  select | plan | score | pairs | convert | rehearsal)
    given+=(--output="$LOGS/%x-%j.log" --nodes=1 --ntasks-per-node=1)
    # A reward model is a network.
    [[ $job != score ]] || ((GPUS_PER_NODE == 0)) || given+=(--gpus-per-node=1)
    ;;
  *)
    nodes=${job^^}_NODES
    given+=(--output="$LOGS/%x-%j.log" --nodes="${!nodes}" --ntasks-per-node="$TASKS_PER_NODE")
    ((GPUS_PER_NODE == 0)) || given+=(--gpus-per-node="$GPUS_PER_NODE")
    ;;
esac
mkdir -p "$LOGS"
exec sbatch "${given[@]}" ${SBATCH_EXTRA[@]+"${SBATCH_EXTRA[@]}"} ${options[@]+"${options[@]}"} "$here/$job.sbatch" "$@"
