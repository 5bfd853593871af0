#!/usr/bin/env bash
# Prove the NPU code on a machine without one: the real torch_npu, on stand-ins for the CANN libraries, with fake tensors; the
# Triton kernels in triton-ascend's interpreter, and compiled for Ascend up to the step that is CANN's own.
#
#   scripts/test-npu.sh [pytest's options]
#       contract, numbers, the whole training step, the schemas of torch-npu 2.7.1, the Triton kernels; then a table of
#       operators and bytes a layer, of the kernels' buffers, and of the bytes that they move
#   TORCH=2.7.1 scripts/test-npu.sh [pytest's options]
#       the same on torch and torch-npu 2.7.1, in the environment that TORCH=2.7.1 make test-versions has made
#
# Needs gcc, and from pip's index torch-npu's wheels (40 MB each), triton-ascend and ascendnpu-ir (220 MB; for Python 3.10 and
# 3.11), all kept below build/npu, none in .venv. Exit status 3: one of these cannot be had, and nothing was tested. Not proved:
# speed, HCCL, and CANN's own bugs.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/check_env.sh
check_env
need_venv
split "${ARGS:-}"
oldest=2.7.1.post11
packages=(triton-ascend==3.2.0 ascendnpu-ir==1.2.0 pybind11) # triton-ascend asks for pybind11 as it is imported

cannot() {
    echo "test-npu.sh: nothing tested: $1" >&2
    exit 3
}

wheel() { # VERSION PYTHON [pip's options]: downloads it on first use and prints its path
    local folder=build/npu/wheels version=$1 python_tag=$2 found why
    shift 2
    if ! compgen -G "$folder/torch_npu-$version-$python_tag-*.whl" >/dev/null; then
        why=$("$python" -m pip download -qq --disable-pip-version-check --no-input --no-deps -d "$folder" "$@" "torch-npu==$version" 2>&1) ||
            cannot "torch-npu $version for $python_tag cannot be had from pip's index: ${why##*$'\n'}"
    fi
    found=("$folder/torch_npu-$version-$python_tag-"*.whl)
    echo "${found[0]}"
}

command -v gcc >/dev/null || cannot "gcc is needed, for the stand-ins of CANN's libraries"
wheels=$(wheel "$oldest" cp310 --python-version 3.10 --only-binary=:all: --platform "manylinux_2_28_$(uname -m)")
export NPU_OLD_WHEEL=$root/$wheels
if [[ -n ${TORCH:-} ]]; then
    [[ $oldest == "$TORCH"* ]] || die "TORCH=$TORCH: only ${oldest%.post*} is known here, beside .venv's own"
    python=build/versions/torch-$TORCH/bin/python version=$oldest
    [[ -e build/versions/torch-$TORCH/.made ]] || die "build/versions/torch-$TORCH is not there: TORCH=$TORCH make test-versions makes it"
else
    version=$("$python" -c 'import torch; print(torch.__version__.partition("+")[0])')
fi
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
folder=build/npu/$version-$tag
file=$(wheel "$version" "$tag")
if [[ ! -e $folder/.made || tests/npu/stand_ins.py -nt $folder/.made ]]; then
    rm -rf "$folder"
    "$python" -m zipfile -e "$file" "$folder/site"
    "$python" tests/npu/stand_ins.py "$folder/site" "$folder/cann"
    touch "$folder/.made"
fi

triton=build/npu/triton-$tag-${packages[0]#*==}-${packages[1]#*==}
if [[ ! -e $triton/.made ]]; then
    rm -rf "$triton"
    why=$("$python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --target "$triton/site" "${packages[@]}" 2>&1) ||
        cannot "${packages[*]} for $tag cannot be had from pip's index: ${why##*$'\n'}"
    touch "$triton/.made"
fi

unset "${env_names[@]}" MAKEFLAGS MAKELEVEL MAKEOVERRIDES MFLAGS
# torch is not to load what .venv may hold, and no CANN of this machine is to be asked
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 LD_LIBRARY_PATH=$root/$folder/cann PYTHONPATH=$root/$folder/site:$root/$triton/site:$root
export BISHENGIR=$root/$triton/site/ascendnpuir/bin/bishengir-compile
unset ASCEND_HOME_PATH ASCEND_OPP_PATH
TRITON_INTERPRET=1 "$python" -m pytest -q -W ignore tests/npu/ladder_*.py "${words[@]}" "$@"
"$python" -W ignore tests/npu/table.py 2>&1 | grep -vE 'ASCEND_HOME_PATH|data_ptr\(\) is null|falling back to its reference'
"$python" -W ignore tests/npu/triton_compile.py
TRITON_INTERPRET=1 "$python" -W ignore tests/npu/triton_cost.py
