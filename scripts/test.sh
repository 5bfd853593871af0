#!/usr/bin/env bash
# Run the tests, all of them on a CPU.
#
#   [ARGS="-k digits -x"] scripts/test.sh [pytest's options]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
split "${ARGS:-}"
# the tests start scripts and make themselves, with settings of their own
unset "${env_names[@]}" MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS
exec "$python" -m pytest -q "${words[@]}" "$@"
