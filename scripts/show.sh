#!/usr/bin/env bash
# Print samples of a recipe as they are trained, the trained tokens marked.
#
#   CONFIG=<recipe> [ARGS="a.b=c …"] scripts/show.sh [a.b=c …]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
exec "$python" -m qwen35.data show "$CONFIG" "${words[@]}" "$@"
