#!/usr/bin/env bash
# Measure speed and memory against transformers' own model and against bare matmuls, as ratios;
# about ten minutes.
#
#   [ARGS="--only moe" | ARGS=--all | ARGS=--json] scripts/bench.sh [the same options]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
exec "$python" -m bench "${words[@]}" "$@"
