#!/usr/bin/env bash
# Ask a model about each record of a data set, and write its answers, a line of JSON each.
#
#   MODEL=<Hugging Face folder, or DCP checkpoint> DATA=<records> OUT=<answers.jsonl> [HF=<model folder>] [ARGS="more options"] scripts/predict.sh
#
# The same command completes what was interrupted. A DCP checkpoint of a run is asked with the model
# folder that the run trained, if HF is not given outside of env.sh.
given_hf=${HF:-} answers=${OUT:-}
unset OUT # elsewhere it is where an export goes, and so what MODEL is
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
OUT=$answers
asks
split "${ARGS:-}"
if help_in "${words[@]}" "$@"; then answers=${answers:--}; fi
[[ -n $answers ]] || die "OUT is not set: name the file for the answers, OUT=answers.jsonl"
exec "$python" -m qwen35.inference.predict --model "$MODEL" ${given_hf:+--hf "$given_hf"} --data "$DATA" --out "$answers" "${words[@]}" "$@"
