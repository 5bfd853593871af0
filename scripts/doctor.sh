#!/usr/bin/env bash
# Check everything that a run needs from this machine. Each line is ok, or wrong with what to do; on a
# CPU it also says what an NPU run would still need. It needs no installation and changes nothing.
# Where all is well for a run on NPUs, it then compiles the Triton kernels of the recipe into
# TRITON_CACHE_DIR, and prints a table of them.
#
#   [CONFIG=<recipe>] [ARGS="a.b=c …"] scripts/doctor.sh [a.b=c …]    settings over the recipe's: docs/settings.md
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/check_env.sh

mapfile -t values < <(wrong_values)
words=()
if error=$(split "${ARGS:-}" 2>&1); then split "${ARGS:-}"; else values+=("${error#*: }"); fi
if (load_cann) >/dev/null 2>&1; then load_cann; fi # where there is none, qwen35.tools.doctor says so
if help_in "${words[@]}" "$@"; then exec bash "$0" --help; fi
device_env
options=("${values[@]/#/--wrong=}")
if [[ $(device) == npu ]]; then options+=(--accelerator=npu); fi
for candidate in "$python" python3 python3.11 python3.10 python3.12; do
    if "$candidate" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null; then
        exec "$candidate" -m qwen35.tools.doctor "${options[@]}" -- "$CONFIG" "${words[@]}" "$@"
    fi
done
printf 'wrong  %s\n' "${values[@]}" "Python  there is none from 3.10 on -> install 3.10 to 3.12, then make install"
exit 1
