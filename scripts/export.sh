#!/usr/bin/env bash
# Turn a checkpoint of a run back into a Hugging Face folder, which transformers and vLLM load.
#
#   DCP=<save folder, or one iter_… or release of it> [HF=<original model folder>] [OUT=<folder to write>] scripts/export.sh
#
# If HF is not given outside of env.sh it is the model folder that the run trained, as its
# config.yaml says. OUT is hf in the folder of the run if it is not given. A LoRA run's adapters are
# merged into the model; ARGS=--adapter writes PEFT's folder instead, OUT being adapter by default.
given_hf=${HF:-}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
recipe=$(run_folder)/config.yaml
if [[ -z $given_hf && -f $recipe ]]; then HF=$("$python" -m qwen35.config.load "$recipe" --get model.model_name_or_path); fi
out=$(exported)
if [[ " ${words[*]} $* " == *" --adapter "* ]]; then out=${OUT:-$(run_folder)/adapter}; fi
exec "$python" -m qwen35.convert dcp_to_hf --dcp_dir "${DCP:-$EXPORT_DCP}" --origin_hf_dir "$HF" --save_hf_dir "$out" "${words[@]}" "$@"
