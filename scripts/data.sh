#!/usr/bin/env bash
# Turn LLaVA-Instruct and the COCO2017 images into training records.
#
#   LLAVA=<llava_instruct_150k.json> IMAGES=<folder of train2017> OUT=<file to write> [ARGS="more options"] scripts/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
exec "$python" -m qwen35.data convert --llava "$LLAVA" --images "$IMAGES" --out "${OUT:-$DATA_OUT}" "${words[@]}" "$@"
