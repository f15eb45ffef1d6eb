# Everything that is yours, in one place. Copy this file, change it, and name the copy:
#
#   export EMU3_SETTINGS=/shared/emu3/settings.sh
#
# Without EMU3_SETTINGS this file is read. It runs where you submit and again inside every job.
# shellcheck shell=bash disable=SC2034

# ---- the cluster
PARTITION=gpu                       # empty: the cluster's default
ACCOUNT=                            # empty: yours
TIME_LIMIT=24:00:00
SIGNAL_SECONDS=600                  # the job is told to save and requeue so long before its limit
GPUS_PER_NODE=8                     # 0: no GPU is asked for
TASKS_PER_NODE=8                    # ranks of a node in training; one for each GPU
CPUS_PER_TASK=12
SBATCH_EXTRA=()                     # other options of sbatch, such as --qos=high --exclusive
MAX_FAILURES=3                      # a training that crashes is started again so often; 0: never

# ---- folders, all on a file system that every node sees
WORK=${EMU3_WORK:-$EMU3_ROOT}       # paths in configurations are relative to it
LOGS=$WORK/logs

# ---- the software: a container (enroot and pyxis), or a plain environment where CONTAINER is empty
CONTAINER=                          # such as /shared/emu3.sqsh or docker://registry#emu3:latest
CONTAINER_MOUNTS=$EMU3_ROOT:$EMU3_ROOT,$WORK:$WORK
PYTHON=$EMU3_ROOT/.venv/bin/python  # in a container: python
prepare_environment() {             # runs on the first node of every job, for module load and the like
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
  # export NCCL_IB_HCA=mlx5 NCCL_SOCKET_IFNAME=ib0
}

# ---- curation and tokenization: array tasks, one GPU each (none where GPUS_PER_NODE is 0)
CURATE_WORKERS=64
CURATE_OPTIONS=(--manifest '["raw.jsonl"]' --output curated)
VISION_CONFIG=examples/configs/vision-tokenizer/from-movq.yaml     # job `vision`: a vision tokenizer of your own
VISION_NODES=8
TOKENIZE_WORKERS=64
DATASETS=(text images videos)       # for each of them `tokenize_options NAME` sets OPTIONS, and PROGRAM where it is another
tokenize_options() {
  OPTIONS=(--output "data/$1" --text-tokenizer tokenizers/emu3.tiktoken --vision-tokenizer tokenizers/vision
           --vocabulary emu3 --num-shards 1024 --device cuda --precision bf16)
  case $1 in
    text) OPTIONS+=(--manifest text.jsonl) ;;
    images) OPTIONS+=(--manifest curated/manifest.jsonl --split images) ;;
    videos) OPTIONS+=(--manifest curated/manifest.jsonl --split videos --video-fps 12 --video-frames 60) ;;
    conversations)
      PROGRAM=tokenize_conversations.py
      OPTIONS=(--manifest '["conversations.json"]' --output "data/$1" --text_tokenizer tokenizers/emu3.tiktoken
               --vision_tokenizer tokenizers/vision --vocabulary emu3 --num_shards 1024 --device cuda --precision bf16)
      ;;
    *) echo "error: settings name no dataset '$1'; DATASETS are: ${DATASETS[*]}" >&2; return 2 ;;
  esac
}

# ---- training: one configuration and a number of nodes for each stage; any YAML of emu3_megatron.training
STAGE1_CONFIG=examples/configs/emu3-8b/stage1-64gpu.yaml
STAGE1_NODES=8
STAGE2_CONFIG=examples/configs/emu3-8b/stage2-64gpu.yaml
STAGE2_NODES=8
QUALITY_CONFIG=examples/configs/emu3-8b/quality.yaml
QUALITY_NODES=8
UNDERSTANDING1_CONFIG=examples/configs/emu3-8b/understanding-1.yaml
UNDERSTANDING1_NODES=8
UNDERSTANDING2_CONFIG=examples/configs/emu3-8b/understanding-2.yaml
UNDERSTANDING2_NODES=8
DPO_CONFIG=examples/configs/emu3-8b/dpo.yaml
DPO_NODES=8
DPO_MODULE=emu3_megatron.posttraining.preferences   # the program; every other stage is emu3_megatron.training

# ---- pairs for DPO: pictures of each prompt, judged by a program (job `score`) or by people (tools/vote.py)
CANDIDATES=runs/candidates
CANDIDATES_WORKERS=8
CANDIDATES_OPTIONS=(--checkpoint runs/emu3-8b-quality --prompts prompts.txt --text-tokenizer tokenizers/emu3.tiktoken
                    --vision-tokenizer tokenizers/vision)
SCORER=my_package.rewards:score     # of (prompt, pixels) to {name: number}
PAIRS_OPTIONS=(--output data/pairs)

# ---- generation (array tasks share the lines of GENERATE_PROMPTS) and conversion
GENERATE_WORKERS=8
GENERATE_PROMPTS=prompts.txt
GENERATE_OUTPUT=generated
GENERATE_OPTIONS=(image --checkpoint runs/emu3-8b-dpo --text-tokenizer tokenizers/emu3.tiktoken
                  --vision-tokenizer tokenizers/vision)
CONVERT_OPTIONS=(export --source runs/emu3-8b-dpo --output hugging-face/emu3-gen
                 --text-tokenizer tokenizers/emu3.tiktoken --vision-tokenizer tokenizers/vision)
