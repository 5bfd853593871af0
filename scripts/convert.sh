#!/usr/bin/env bash
# Convert a Hugging Face folder into a DCP checkpoint that training.load takes.
#
#   HF=<model folder> [DCP=<folder to write, default ckpt/mm_path/ and the name of HF>] [TIE='{"one": "other"}'] scripts/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
exec "$python" -m qwen35.convert hf_to_dcp --hf_dir "$HF" --dcp_dir "$(converted)" ${TIE:+--tie_weight_mapping "$TIE"} "${words[@]}" "$@"
