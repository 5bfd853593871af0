#!/usr/bin/env bash
# Run the tests on other versions of what they stand on, in an environment below build/versions that
# is made on first use.
#
#   [TRANSFORMERS=5.2.0] scripts/test-versions.sh [pytest's options]
#       that transformers, and all else from .venv; the tests in which it takes part (tests/marks.py), but for those
#       beside peft, whose release belongs to the pinned transformers
#   TORCH=2.7.1 [PYTHON=/path/to/python3.10] [TORCH_INDEX=…] scripts/test-versions.sh [pytest's options]
#       that torch with the other pins of an NPU installation (numpy 1, protobuf 3, …) but without torch-npu and
#       triton-ascend, on Python 3.10 where there is one; all tests
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/check_env.sh
check_env
need_venv
split "${ARGS:-}"

with_torch() { # a whole environment, by the lock of an NPU installation
    local folder=build/versions/$1 lock=scripts/requirements/npu-arm.txt base
    is_made "$folder" "$lock" && return
    base=$(find_python python3.10 python3 python3.11 python3.12)
    echo "making $folder with $base (torch takes longest)"
    "$base" -m venv --clear "$folder"
    sed -E "/^(torch-npu|triton-ascend)==/d; s/^torch==.*/torch==$TORCH/" "$lock" >"$folder/pins.txt"
    "$folder/bin/python" "${pip[@]}" --requirement "$folder/pins.txt" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
    "$folder/bin/python" "${pip[@]}" --no-deps --no-build-isolation --editable .
    touch "$folder/.made"
}

if [[ -n ${TORCH:-} ]]; then
    name=torch-$TORCH wanted=(torch "$TORCH")
    with_torch "$name"
    choice=()
else
    name=transformers-$TRANSFORMERS wanted=(transformers "$TRANSFORMERS")
    beside_venv "build/versions/$name" .venv/.installed "transformers==$TRANSFORMERS"
    choice=(-m "transformers and not peft")
fi

# the tests start scripts and make themselves, with settings of their own
unset "${env_names[@]}" MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS PYTHONDONTWRITEBYTECODE # with bytecode many processes start sooner
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
python=build/versions/$name/bin/python
"$python" - "${wanted[@]}" <<'PY'
import importlib
import platform
import sys

import torch
import transformers

package, wanted = sys.argv[1:]
found = importlib.import_module(package).__version__.partition("+")[0]
print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
sys.exit(0 if found == wanted else f"{package} {found} is what is imported, {wanted} was asked for")
PY
lanes=()
((${#words[@]} + $#)) || lanes=(--numprocesses 2 --dist loadfile --no-loadscope-reorder)
exec "$python" -m pytest -q "${choice[@]}" "${lanes[@]}" "${words[@]}" "$@"
