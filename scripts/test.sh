#!/usr/bin/env bash
# Run the tests, on a CPU. Without options all of them run in two lanes, file by file, and then
# scripts/test-npu.sh proves the NPU code; where torch-npu's wheel or gcc cannot be had, one line says
# so and the rest still counts.
#
#   scripts/test.sh                           all of them
#   ARGS="-m quick" scripts/test.sh           before each commit: those that start no process
#   ARGS="-k digits -x" scripts/test.sh       any of pytest's options, also behind scripts/test.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
split "${ARGS:-}"
# the tests start scripts and make themselves, with settings of their own
unset "${env_names[@]}" MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS PYTHONDONTWRITEBYTECODE # with bytecode many processes start sooner
choice=("${words[@]}" "$@") lanes=(--numprocesses 2 --dist loadfile --no-loadscope-reorder)
case "${choice[*]}" in
    "") ;;
    "-m quick") exec "$python" -m pytest -q "${lanes[@]}" "${choice[@]}" ;;
    *) exec "$python" -m pytest -q "${choice[@]}" ;;
esac
"$python" -m pytest -q "${lanes[@]}"
bash scripts/test-npu.sh || { status=$? && ((status == 3)) || exit "$status"; }

