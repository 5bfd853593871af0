#!/usr/bin/env bash
# Ask a model about held-out records, and count the right answers.
#
#   MODEL=<Hugging Face folder, or DCP checkpoint> DATA=<records> [ARGS="more options"] scripts/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
asks
split "${ARGS:-}"
exec "$python" -m qwen35.inference.evaluate --model "$MODEL" --data "$DATA" "${words[@]}" "$@"
