#!/usr/bin/env bash
# Turn a checkpoint of a run back into a Hugging Face folder, which transformers and vLLM load.
#
#   DCP=<save folder, or one iter_… or release of it> HF=<original model folder> OUT=<folder to write> [ARGS="more options"] scripts/export.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
exec "$python" -m qwen35.convert dcp_to_hf --dcp_dir "${DCP:-$EXPORT_DCP}" --origin_hf_dir "$HF" --save_hf_dir "${OUT:-$EXPORT_OUT}" "${words[@]}" "$@"
