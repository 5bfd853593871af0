#!/usr/bin/env bash
# Run the tests, all of them on a CPU. Without options that choose among them they run in two lanes,
# a file in one of them, and what scripts/test-npu.sh proves of the NPU code belongs to them; where
# torch-npu's wheel or gcc cannot be had that is said in one line, and does not fail the rest.
#
#   [ARGS="-k digits -x"] scripts/test.sh [pytest's options]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
split "${ARGS:-}"
# the tests start scripts and make themselves, with settings of their own
unset "${env_names[@]}" MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS
if ((${#words[@]} + $#)); then
    exec "$python" -m pytest -q "${words[@]}" "$@"
else
    "$python" -m pytest -q --numprocesses 2 --dist loadfile
    bash scripts/test-npu.sh || { status=$? && ((status == 3)) || exit "$status"; }
fi
