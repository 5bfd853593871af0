#!/usr/bin/env bash
# Turn LLaVA-Instruct and the COCO2017 images into training records; or say how long the samples of
# any other records are, which need no conversion.
#
#   DATA=<your records> HF=<model folder> [ARGS="more options"] scripts/data.sh
#   LLAVA=<llava_instruct_150k.json> IMAGES=<folder of train2017> OUT=<file to write> [HF=<model folder>] [ARGS="more options"] scripts/data.sh
#
# A report is written beside the file. Lengths in it are in tokens if HF is given outside of env.sh,
# else in characters.
given_hf=${HF:-} given_data=${DATA:-}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
if [[ -n $given_data ]]; then
    [[ -n $given_hf ]] || die "HF is not set: name the model whose tokens are counted, HF=ckpt/hf_path/…"
    exec "$python" -m qwen35.data lengths --data "$given_data" --tokenizer "$HF" "${words[@]}" "$@"
fi
exec "$python" -m qwen35.data convert --llava "$LLAVA" --images "$IMAGES" --out "${OUT:-$DATA_OUT}" ${given_hf:+--tokenizer "$given_hf"} "${words[@]}" "$@"
