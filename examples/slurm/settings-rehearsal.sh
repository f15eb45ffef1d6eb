# Settings of rehearsal.sh: the sample world through every job. What the cluster is stands in the file that
# EMU3_CLUSTER names (your settings.sh, say); by default it is the one of `python -m tests.slurm.cluster`.
# shellcheck shell=bash disable=SC2034
# shellcheck source=examples/slurm/settings-local.sh
source "${EMU3_CLUSTER:-$EMU3_ROOT/examples/slurm/settings-local.sh}"
WORK=$EMU3_REHEARSAL
PYTHON=${EMU3_PYTHON:-$PYTHON}
LOGS=$WORK/logs
CONTAINER_MOUNTS=$EMU3_ROOT:$EMU3_ROOT,$WORK:$WORK
DEVICE=$( ((GPUS_PER_NODE)) && echo cuda || echo cpu)
TOKENIZERS=(--text-tokenizer text.model --vision-tokenizer vision-tokenizer)
PICTURES=("${TOKENIZERS[@]}" --prompts prompts.txt --height 64 --width 64 --top-k 20)

CURATE_WORKERS=2
CURATE_OPTIONS=(--config configs/curation.yaml)
SELECT_OPTIONS=(--manifest '["curated/manifest.jsonl"]' --output chosen.jsonl --scores '["motion"]' --share 0.5
                --skip_unscored true)
VISION_CONFIG=configs/vision.yaml
TOKENIZE_WORKERS=2
DATASETS=(text images videos quality-videos conversations)
tokenize_options() {
  OPTIONS=(--output "data/$1" "${TOKENIZERS[@]}" --num-shards 2 --device "$DEVICE")
  case $1 in
    text) OPTIONS+=(--manifest curated/manifest.jsonl --split texts) ;;
    images) OPTIONS+=(--manifest curated/manifest.jsonl --split images --image-area 4096) ;;
    videos) OPTIONS+=(--manifest curated/manifest.jsonl --split videos --image-area 4096 --video-frames 8) ;;
    quality-videos) OPTIONS+=(--manifest chosen.jsonl --split videos --image-area 4096 --video-frames 8) ;;
    conversations)
      PROGRAM=tokenize_conversations.py
      OPTIONS=(--manifest '["conversations/conversations.json"]' --output "data/$1" --text_tokenizer text.model
               --vision_tokenizer vision-tokenizer --num_shards 2 --min_area 4096 --max_area 4096 --device "$DEVICE")
      ;;
    *) echo "error: the rehearsal has no dataset '$1'; they are: ${DATASETS[*]}" >&2; return 2 ;;
  esac
}

STAGE1_CONFIG=configs/stage1.yaml
STAGE2_CONFIG=configs/stage2.yaml
QUALITY_CONFIG=configs/quality.yaml
UNDERSTANDING1_CONFIG=configs/understanding1.yaml
UNDERSTANDING2_CONFIG=configs/understanding2.yaml
DPO_CONFIG=configs/dpo.yaml
NODES=${EMU3_REHEARSAL_NODES:-2}
VISION_NODES=$NODES STAGE1_NODES=$NODES STAGE2_NODES=$NODES QUALITY_NODES=$NODES
UNDERSTANDING1_NODES=$NODES UNDERSTANDING2_NODES=$NODES DPO_NODES=$NODES

CANDIDATES=runs/candidates
CANDIDATES_WORKERS=2
CANDIDATES_OPTIONS=(--checkpoint runs/quality "${PICTURES[@]}" --candidates 4)
SCORER=emu3_megatron.samples.rehearsal:score_background
PAIRS_OPTIONS=(--output data/pairs)
GENERATE_WORKERS=2
GENERATE_PROMPTS=prompts.txt
GENERATE_OUTPUT=generated
GENERATE_OPTIONS=(image --checkpoint runs/dpo "${TOKENIZERS[@]}" --height 64 --width 64 --top-k 20)
CONVERT_OPTIONS=(export --source runs/dpo --output hugging-face --overwrite "${TOKENIZERS[@]}")
