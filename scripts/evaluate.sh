#!/usr/bin/env bash
# Ask a model about held-out records, and count the right answers.
#
#   MODEL=<Hugging Face folder> DATA=<records> scripts/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
exec "$python" -m qwen35.evaluate --model "$MODEL" --data "$DATA" "$@"
