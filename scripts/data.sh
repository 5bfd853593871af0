#!/usr/bin/env bash
# Turn LLaVA-Instruct and the COCO2017 images into training records.
#
#   LLAVA=<llava_instruct_150k.json> IMAGES=<folder of train2017> OUT=<file to write> [HF=<model folder>] [ARGS="more options"] scripts/data.sh
#
# A report is written beside the file. Lengths in it are in tokens if HF is given outside of env.sh,
# else in characters.
given_hf=${HF:-}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
exec "$python" -m qwen35.data convert --llava "$LLAVA" --images "$IMAGES" --out "${OUT:-$DATA_OUT}" ${given_hf:+--tokenizer "$given_hf"} "${words[@]}" "$@"
