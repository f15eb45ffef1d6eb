#!/usr/bin/env bash
# Submit the whole chain, each job after those it needs; prints the jobs' numbers.
#
#   examples/slurm/chain.sh [JOB ...]
#
# Without names: from curation to conversion, with a released vision tokenizer and pairs that are there. With names, only
# these, in this order: each waits for what it needs among them. A requeued job keeps its number, so what waits for it
# goes on waiting; when a job fails for good, what waits for it is cancelled.
set -euo pipefail
submit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/submit.sh
EMU3_ROOT=$(cd "$(dirname "$submit")/../.." && pwd)
# shellcheck source=examples/slurm/settings.sh
source "${EMU3_SETTINGS:-$EMU3_ROOT/examples/slurm/settings.sh}"

declare -A needs=(
  [curate]='' [select]='curate' [vision]='curate' [tokenize]='vision select' [plan]='tokenize' [stage1]='plan' [stage2]='stage1'
  [quality]='stage2' [understanding1]='stage2' [understanding2]='understanding1'
  [candidates]='quality' [score]='candidates' [pairs]='score' [dpo]='pairs'
  [generate]='dpo' [convert]='dpo'
)
declare -A numbers=()

# The nearest jobs of this chain that JOB must wait for: a job that is left out is replaced by what it needs.
awaited() {
  local need
  for need in ${needs[$1]}; do
    if [[ -n ${numbers[$need]:-} ]]; then echo "${numbers[$need]}"; else awaited "$need"; fi
  done
}

(($#)) || set -- curate select tokenize plan stage1 stage2 quality understanding1 understanding2 dpo generate convert
for job in "$@"; do
  if [[ -z ${needs[$job]+known} ]]; then
    echo "error: '$job' is not a job of the chain; they are: ${!needs[*]}" >&2
    exit 2
  fi
  after=$(awaited "$job" | sort --unique | paste -sd :)
  options=(${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes})
  if [[ $job == tokenize ]]; then
    for dataset in "${DATASETS[@]}"; do
      number=$("$submit" tokenize --job-name="tokenize-$dataset" ${options[@]+"${options[@]}"} -- "$dataset")
      numbers[$job]=${numbers[$job]:+${numbers[$job]}:}${number%%;*}
      echo "$job-$dataset ${number%%;*}"
    done
  else
    number=$("$submit" "$job" ${options[@]+"${options[@]}"})
    numbers[$job]=${number%%;*}
    echo "$job ${numbers[$job]}"
  fi
done
