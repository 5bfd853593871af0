#!/usr/bin/env bash
# Write the page of a run, or one that compares several.
#
#   RUN=<folder of training.save>[,<another> …] [ARGS="--out FILE"] scripts/report.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
IFS=, read -ra runs <<<"$RUN"
exec "$python" -m qwen35.training.report "${runs[@]}" "${words[@]}" "$@"
