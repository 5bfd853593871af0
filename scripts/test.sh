#!/usr/bin/env bash
# Run the tests, on a CPU. Without options all of them run in three lanes, file by file, and beside
# them scripts/test-npu.sh, which proves the NPU code and is shown at the end; where torch-npu's wheel
# or gcc cannot be had, one line says so and the rest still counts.
#
#   scripts/test.sh                           all of them
#   ARGS="-m quick" scripts/test.sh           before each commit: those that start no process
#   ARGS="-k digits -x" scripts/test.sh       any of pytest's options, also behind scripts/test.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
split "${ARGS:-}"
# the tests start scripts and make themselves, with settings of their own
unset "${env_names[@]}" MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS PYTHONDONTWRITEBYTECODE # with bytecode many processes start sooner
choice=("${words[@]}" "$@") lanes=(--numprocesses 3 --dist loadfile --no-loadscope-reorder) # two cores suffice: a lane often waits
case "${choice[*]}" in
    "") ;;
    "-m quick") exec "$python" -m pytest -q "${lanes[@]}" "${choice[@]}" ;;
    *) exec "$python" -m pytest -q "${choice[@]}" ;;
esac
proof=$(mktemp)
setsid bash scripts/test-npu.sh --dist no >"$proof" &
npu=$!
trap 'kill -- "-$npu" 2>/dev/null || true; rm -f "$proof"' EXIT
suite=0 status=0
"$python" -m pytest -q "${lanes[@]}" || suite=$?
wait "$npu" || status=$?
cat "$proof"
((suite == 0)) || exit "$suite"
((status == 0 || status == 3)) || exit "$status"

