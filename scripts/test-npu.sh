#!/usr/bin/env bash
# Prove the NPU code on a machine without one: the real torch_npu, on stand-ins for the CANN
# libraries, with fake tensors; the Triton kernels in triton-ascend's interpreter, and compiled for
# Ascend up to the step that is CANN's own.
#
#   scripts/test-npu.sh [pytest's options]
#       contract, numbers, the whole training step, the schemas of torch-npu 2.7.1, the Triton kernels, in two lanes; then
#       the tables that the tests made: operators and bytes a layer, the kernels' buffers, and the bytes that they move
#   TORCH=2.10.0 scripts/test-npu.sh [pytest's options]
#       the same on that torch, as 2.7.1, and the newest torch-npu that goes with it (scripts/requirements/versions.txt), in the
#       environment that TORCH=2.10.0 make test-versions has made
#
# Needs gcc, and from pip's index torch-npu's wheels (40 MB each), triton-ascend and ascendnpu-ir
# (220 MB; for Python 3.10 and 3.11), all kept below build/npu, none in .venv. Exit status 3: one of
# these cannot be had, and nothing was tested. Not proved: speed, HCCL, and CANN's own bugs.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/check_env.sh
source scripts/stand_ins.sh
check_env
need_venv
split "${ARGS:-}"
need_gcc
wheels=$(wheel "$oldest" cp310 --python-version 3.10 --only-binary=:all: --platform "manylinux_2_28_$(uname -m)")
export NPU_OLD_WHEEL=$root/$wheels
if [[ -n ${TORCH:-} ]]; then
    read -r version triton <<<"$(newest_for "$TORCH")"
    [[ -n $version ]] || die "TORCH=$TORCH: scripts/requirements/versions.txt has no torch_npu for it"
    python=build/versions/torch-$TORCH/bin/python
    [[ -e build/versions/torch-$TORCH/.made ]] || die "build/versions/torch-$TORCH is not there: TORCH=$TORCH make test-versions makes it"
else
    version=$(torch_version)
fi
make_stand_ins "$version"
if [[ triton-ascend==${triton:-} != "${packages[0]}" && -n ${triton:-} ]]; then
    echo "torch_npu $version goes with triton-ascend $triton, which pip's index lacks: the kernels are tried on ${packages[0]#*==}"
fi

unset "${env_names[@]}" MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS PYTHONDONTWRITEBYTECODE # with bytecode many processes start sooner
export NPU_TABLES=$root/build/npu/tables TRITON_INTERPRET=1
rm -rf "$NPU_TABLES"
mkdir -p "$NPU_TABLES"
lanes=()
((${#words[@]} + $#)) || lanes=(--numprocesses 2 --dist loadfile --no-loadscope-reorder)
# the longest come first, so that no lane waits long for the other
"$python" -m pytest -q -W ignore -o pythonpath=tests/kernels "${lanes[@]}" \
    tests/npu/ladder_{triton_numbers,triton_compile,rehearse,step}.py tests/npu/ladder_*.py "${words[@]}" "$@"
for table in "$NPU_TABLES"/*.md; do # in the order of their names; none where other tests were chosen
    [[ ! -e $table ]] || { echo && cat "$table"; }
done
