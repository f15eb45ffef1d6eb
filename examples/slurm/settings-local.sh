# Settings for a SLURM without GPUs and with nodes of little memory, such as the one of `python -m tests.slurm.cluster`:
# the small run of examples/configs/tiny.yaml on two nodes. Each value here replaces one of settings.sh.
# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/slurm/settings.sh
source "$EMU3_ROOT/examples/slurm/settings.sh"
PARTITION=
GPUS_PER_NODE=0
TASKS_PER_NODE=1
CPUS_PER_TASK=1
TIME_LIMIT=30
SIGNAL_SECONDS=60
MAX_FAILURES=1
LOGS=$WORK/runs/slurm-logs
STAGE1_CONFIG=examples/configs/tiny.yaml
STAGE1_NODES=2
