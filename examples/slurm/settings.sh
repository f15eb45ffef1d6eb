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
MAX_FAILURES=3                      # a job that crashes, or gets nowhere by its time limit, is started again so often

# ---- folders, all on a file system that every node sees
WORK=${EMU3_WORK:-$EMU3_ROOT}       # paths in configurations are relative to it
LOGS=$WORK/logs

# ---- the software: a container (enroot and pyxis), or a plain environment where CONTAINER is empty
CONTAINER=                          # such as /shared/emu3.sqsh or docker://registry#emu3:latest, made of this clone
CONTAINER_MOUNTS=$EMU3_ROOT:$EMU3_ROOT,$WORK:$WORK
PYTHON=$EMU3_ROOT/.venv/bin/python  # in a container: python
prepare_environment() {             # runs on the first node of every job, for module load and the like
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
  # export NCCL_IB_HCA=mlx5 NCCL_SOCKET_IFNAME=ib0
}

# ---- curation and tokenization: array tasks, one GPU each (none where GPUS_PER_NODE is 0)
CURATE_WORKERS=64
# A thousandth of the images, videos and texts is held out for validation: entries get a `split`, `images` or
# `held-out-images` and so on, unless they have one.
CURATE_OPTIONS=(--manifest '["raw.jsonl"]' --output curated --held_out 0.001)
# What quality fine-tuning sees: by curation's score here; by preference scores of your own as in docs/post-training.md.
SELECT_OPTIONS=(--manifest '["curated/manifest.jsonl"]' --output chosen.jsonl --scores '["quality"]' --share 0.1
                --skip_unscored true)
VISION_CONFIG=examples/configs/vision-tokenizer/from-movq.yaml     # job `vision`: a vision tokenizer of your own
VISION_NODES=8
TOKENIZE_WORKERS=64
# For each of them `tokenize_options NAME` sets OPTIONS, and PROGRAM where it is another.
DATASETS=(text images videos held-out-text held-out-images held-out-videos
          quality-images quality-videos held-out-quality-images held-out-quality-videos
          conversations held-out-conversations)
tokenize_options() {
  local held_out='' shards=1024
  [[ $1 != held-out-* ]] || held_out=held-out- shards=8
  OPTIONS=(--output "data/$1" --text-tokenizer tokenizers/emu3.tiktoken --vision-tokenizer tokenizers/vision
           --vocabulary emu3 --num-shards "$shards" --device cuda --precision bf16)
  local clips=(--video-fps 12 --video-frames 60)
  case ${1#held-out-} in
    text) OPTIONS+=(--manifest curated/manifest.jsonl --split "${held_out}texts") ;;
    images) OPTIONS+=(--manifest curated/manifest.jsonl --split "${held_out}images") ;;
    videos) OPTIONS+=(--manifest curated/manifest.jsonl --split "${held_out}videos" "${clips[@]}") ;;
    quality-images) OPTIONS+=(--manifest chosen.jsonl --split "${held_out}images" --image-area 518400) ;;
    quality-videos) OPTIONS+=(--manifest chosen.jsonl --split "${held_out}videos" --image-area 518400 "${clips[@]}") ;;
    conversations)  # two files that you write: docs/slurm.md
      PROGRAM=tokenize_conversations.py
      OPTIONS=(--manifest "[\"$1.json\"]" --output "data/$1" --text_tokenizer tokenizers/emu3.tiktoken
               --vision_tokenizer tokenizers/vision --vocabulary emu3 --num_shards "$shards" --device cuda
               --precision bf16)
      ;;
    *) echo "error: settings name no dataset '$1'; DATASETS are: ${DATASETS[*]}" >&2; return 2 ;;
  esac
}

# ---- training: one configuration and a number of nodes for each stage; any YAML of emu3_megatron.training
STAGE1_CONFIG=examples/configs/emu3-8b/stage1-64gpu.yaml
STAGE1_NODES=8
STAGE2_CONFIG=examples/configs/emu3-8b/stage2-64gpu.yaml
STAGE2_NODES=8
QUALITY_CONFIG=examples/configs/emu3-8b/quality-64gpu.yaml
QUALITY_NODES=8
UNDERSTANDING1_CONFIG=examples/configs/emu3-8b/understanding-1-64gpu.yaml
UNDERSTANDING1_NODES=8
UNDERSTANDING2_CONFIG=examples/configs/emu3-8b/understanding-2-64gpu.yaml
UNDERSTANDING2_NODES=8
DPO_CONFIG=examples/configs/emu3-8b/dpo-64gpu.yaml
DPO_NODES=8
DPO_MODULE=emu3_megatron.posttraining.preferences   # the program; every other stage is emu3_megatron.training

# ---- pairs for DPO: pictures of each prompt, judged by a program (job `score`) or by people (tools/vote.py)
CANDIDATES=runs/candidates
CANDIDATES_WORKERS=8
CANDIDATES_OPTIONS=(--checkpoint runs/emu3-8b-quality --prompts prompts.txt --text-tokenizer tokenizers/emu3.tiktoken
                    --vision-tokenizer tokenizers/vision)
SCORER=my_package.rewards:score     # of (prompt, pixels) to {name: number}
PAIRS_OPTIONS=(--output data/pairs --held-out data/held-out-pairs)

# ---- generation (array tasks share the lines of GENERATE_PROMPTS) and conversion
GENERATE_WORKERS=8
GENERATE_PROMPTS=prompts.txt
GENERATE_OUTPUT=generated
GENERATE_OPTIONS=(image --checkpoint runs/emu3-8b-dpo --text-tokenizer tokenizers/emu3.tiktoken
                  --vision-tokenizer tokenizers/vision)
CONVERT_OPTIONS=(export --source runs/emu3-8b-dpo --output hugging-face/emu3-gen
                 --text-tokenizer tokenizers/emu3.tiktoken --vision-tokenizer tokenizers/vision)
