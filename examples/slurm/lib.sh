# What the job scripts have in common. Sourced inside a job; `run_job` is the way in.
# shellcheck shell=bash

EMU3_ROOT=${EMU3_ROOT:-$SLURM_SUBMIT_DIR}
EMU3_SETTINGS=${EMU3_SETTINGS:-$EMU3_ROOT/examples/slurm/settings.sh}
export EMU3_ROOT EMU3_SETTINGS
# shellcheck source=examples/slurm/settings.sh
source "$EMU3_SETTINGS"

JOB_LOGS=$LOGS/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
ATTEMPT=$JOB_LOGS/attempt-${SLURM_RESTART_COUNT:-0}
export FAILURES=$ATTEMPT/failures
USER_ERROR=2       # exit code of every program for what only its user can put right

say() { echo "$(date +%H:%M:%S) $*"; }

# Where processes meet: a port of the first node. Another port for every attempt, so that a rest of the last one is
# not in the way.
rendezvous() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  first=${first%%$'\n'*}
  MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  MASTER_PORT=$((20000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 12000))
  WORLD_SIZE=$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))
  export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT WORLD_SIZE
}

check_nodes() {
  local gpus=$GPUS_PER_NODE
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || gpus=$((gpus > 0))
  case $SLURM_JOB_NAME in
    select* | plan* | pairs* | convert* | rehearsal*) gpus=0 ;;
    score*) gpus=$((gpus > 0)) ;;
  esac
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    "$EMU3_ROOT/examples/slurm/check_node.sh" "$gpus" "$WORK" && return
  say "not started: exclude the node (sbatch --exclude=NODE), tell your administrators, and submit again"
  return 1
}

# The rank that failed first and the end of its log. Ranks that SLURM told to stop because another one had failed come
# last; of the others, one whose log names an error is better than one that left silently, because another one spoke.
first_failure() {
  local rank node code told best='' log
  while read -r _ rank node code told; do
    [[ -n $best ]] || best="$rank $node $code"
    if [[ $told == no ]] && grep -qE '^error: |Traceback|Error: ' "$ATTEMPT/rank-$rank.log" 2>/dev/null; then
      best="$rank $node $code"
      break
    fi
  done < <(cat "$FAILURES"/rank-* 2>/dev/null | sort -k5,5 -k1,1n)
  echo "$best"
}

report_failure() {  # EXIT_CODE of srun
  local rank node code log count
  read -r rank node code < <(first_failure) || true
  count=$(find "$FAILURES" -name 'rank-*' | wc -l)
  echo
  echo "======== FAILED: attempt ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID ($SLURM_JOB_NAME), srun ended with $1"
  if [[ -z ${rank:-} ]]; then
    echo "no rank left a record: a node was lost, or processes were killed; see the logs in $ATTEMPT"
    return
  fi
  log=$ATTEMPT/rank-$rank.log
  echo "$count of $WORLD_SIZE ranks failed; the first was rank $rank on node $node, with exit code $code"
  echo "the end of $log:"
  tail -n 30 "$log"
}

# Where the package has not been built for the ranks' Python, its folder. Starting again does not help there.
unbuilt_package() {
  sed -n "s|.*cannot import name '_kernels' from .*(\(.*\)/__init__\.py).*|\1|p" "$ATTEMPT"/rank-*.log 2>/dev/null |
    head -n 1
}

# Whether a file has been finished below the command's --output, or below PROGRESS, since the attempt began; what is
# hidden is not finished. Tasks of an array share the folder: while any of them gets on, all are started again.
progressed() {  # COMMAND [arguments]
  local folder=${PROGRESS:-} before='' word
  for word in "$@"; do
    [[ $before != --output ]] || folder=$word
    [[ $word != --output=* ]] || folder=${word#*=}
    before=$word
  done
  [[ -n $folder && -n $(find "$folder" -type f ! -name '.*' -newer "$ATTEMPT/begun" -print -quit 2>/dev/null) ]]
}

# The number of tasks that share an array's work. A submission may be of some of them alone, to try them again, so it
# is not the submission's SLURM_ARRAY_TASK_COUNT.
workers() {  # NUMBER in the settings
  echo "${EMU3_WORKERS:-$1}"
}

requeue() {  # WHY
  say "requeued: $1"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 300  # SLURM ends this script; leaving by itself would look like the end of the job
  exit 1
}

# After SIGTERM the ranks have saved and ended well, but are not finished. SLURM sent it to cancel or preempt the job, and
# does so while this waits; what depends on the job must not take it for finished.
stopped() {
  say "stopped by SIGTERM, the state is saved; submitted again, the job goes on"
  sleep 300
  exit 1
}

# Run a command as ranks of this allocation, one log for each, and decide what the end means.
#   exit 0                      finished
#   told by SIGUSR1             saved (0), or ended with something finished: requeue, and the same command goes on
#   told by SIGTERM             saved: SLURM cancels the job, or preempts and requeues it
#   exit code 2                 the user must put something right: no requeue
#   anything else               requeue, at most MAX_FAILURES times
run_job() {
  local step='' status=0 stopping=no failures unbuilt container=()
  mkdir -p "$FAILURES"
  rm -f "$FAILURES"/rank-* "$FAILURES/told"
  touch "$ATTEMPT/begun"
  trap 'stopping=yes; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null' USR1
  prepare_environment
  rendezvous
  say "job $SLURM_JOB_ID, attempt ${SLURM_RESTART_COUNT:-0}: $WORLD_SIZE processes on $SLURM_JOB_NODELIST, logs in $ATTEMPT"
  check_nodes
  if [[ -n $CONTAINER ]]; then
    container=(--container-image="$CONTAINER" --container-mounts="$CONTAINER_MOUNTS" --container-workdir="$WORK")
    # The image has the package, built for its Python. The clone's must not come first where WORK is the clone.
    export PYTHONSAFEPATH=1
  else
    export PYTHONPATH=$EMU3_ROOT${PYTHONPATH:+:$PYTHONPATH}
  fi
  [[ $stopping == no ]] || requeue "the time limit is near, nothing was started"
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over from the job by itself
  srun --nodes="$SLURM_NNODES" --ntasks="$WORLD_SIZE" --kill-on-bad-exit=1 --output="$ATTEMPT/rank-%t.log" \
    ${container[@]+"${container[@]}"} "$EMU3_ROOT/examples/slurm/rank.sh" "$@" &
  step=$!
  # A signal ends `wait` before the step has ended.
  while :; do
    wait "$step" && status=0 || status=$?
    kill -0 "$step" 2>/dev/null || break
  done
  wait "$step" 2>/dev/null && status=0 || status=$?
  if ((status == 0)); then
    [[ $stopping == no ]] || requeue "the time limit is near, the state is saved"
    [[ ! -e $FAILURES/told ]] || stopped
    say "finished"
    return
  fi
  if [[ $stopping == yes && $(first_failure) != *" $USER_ERROR" ]] && progressed "$@"; then
    requeue "the time limit is near, what is finished is kept"
  fi
  touch "$ATTEMPT/failed"
  failures=$(find "$JOB_LOGS" -mindepth 2 -maxdepth 2 -name failed | wc -l)
  report_failure "$status"
  unbuilt=$(unbuilt_package) || true  # there may be no log at all
  if [[ -n $unbuilt ]]; then
    say "error: $unbuilt is not built for this Python: run 'make env' in its clone, or take the clone off PYTHONPATH"
    return "$USER_ERROR"
  fi
  if [[ $(first_failure) != *" $USER_ERROR" ]] && ((failures <= MAX_FAILURES)); then
    requeue "failure $failures, at most $MAX_FAILURES are started again"
  fi
  return "$status"
}

# Train with a configuration; PROGRAM is the module where it is not the plain training.
train() {  # CONFIG [options of training]
  local config=$1
  shift
  [[ $config == /* || -f $config ]] || config=$EMU3_ROOT/$config
  run_job "$PYTHON" -m "${PROGRAM:-emu3_megatron.training}" --config "$config" --logging.progress false "$@"
}
