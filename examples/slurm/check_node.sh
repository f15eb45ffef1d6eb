#!/usr/bin/env bash
# Whether a node is fit for work; runs once on every node of a job before anything else. One line for each fault.
#
#   check_node.sh GPUS SHARED_FOLDER
set -uo pipefail
gpus=$1
shared=$2
node=${SLURMD_NODENAME:-$(hostname)}
sound=0
fault() {
  echo "node $node is not fit: $*" >&2
  sound=1
}

if probe=$(mktemp "$shared/.health-$node-XXXXXX" 2>/dev/null); then
  rm -f "$probe"
else
  fault "cannot write to $shared; mount the shared file system there"
fi
for folder in /dev/shm "${TMPDIR:-/tmp}"; do
  free=$(df --output=avail --block-size=1M "$folder" 2>/dev/null | tail -n 1)
  ((${free:-0} >= 256)) || fault "$folder has ${free:-0} MiB free, 256 are needed; remove what is left there"
done
if ((gpus > 0)); then
  if ! listed=$(nvidia-smi --query-gpu=uuid --format=csv,noheader 2>&1); then
    fault "nvidia-smi: $(head -n 1 <<<"$listed")"
  else
    seen=$(wc -l <<<"$listed")
    ((seen >= gpus)) || fault "$seen of $gpus GPUs answer"
    errors=$(nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total --format=csv,noheader |
      awk -F', ' '$2 ~ /^[0-9]+$/ && $2 > 0 {print "GPU " $1 ": " $2}' | paste -sd ' ')
    [[ -z $errors ]] || fault "uncorrected memory errors ($errors); reset the GPU"
    # With fewer GPUs than the node has, others may be at work there.
    ((seen > gpus)) || busy=$(nvidia-smi --query-compute-apps=pid,process_name --format=csv,noheader | head -n 1)
    [[ -z ${busy:-} ]] || fault "a GPU is in use by another process ($busy)"
  fi
fi
exit "$sound"
