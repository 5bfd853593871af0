# shellcheck shell=bash
# Sourced by what runs NPU code on a machine without NPUs: torch-npu's wheel, stand-ins for the CANN
# libraries that it links, and triton-ascend, all below build/npu, none in .venv. Needs gcc, and
# pip's index on first use.
# shellcheck disable=SC2034,SC2154 # root and python come from common.sh, what is set here serves who sources it

oldest=2.7.1.post2 # what `make install` takes for CANN 8.5: its schemas are read out of its wheel
packages=(triton-ascend==3.2.0 ascendnpu-ir==1.2.0 pybind11) # triton-ascend asks for pybind11 as it is imported

cannot() { # exit status 3: what is needed cannot be had
    echo "$(basename "$0"): nothing ${what_is_done:-tested}: $1" >&2
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

need_gcc() {
    command -v gcc >/dev/null || cannot "gcc is needed, for the stand-ins of CANN's libraries"
}

make_stand_ins() { # VERSION of torch-npu: what $python needs to run it; exports the paths
    local tag folder file triton why
    need_gcc
    tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    folder=build/npu/$1-$tag
    file=$(wheel "$1" "$tag")
    if [[ ! -e $folder/.made || rehearse/stand_ins.py -nt $folder/.made ]]; then
        rm -rf "$folder"
        "$python" -m zipfile -e "$file" "$folder/site"
        "$python" rehearse/stand_ins.py "$folder/site" "$folder/cann"
        touch "$folder/.made"
    fi
    triton=build/npu/triton-$tag-${packages[0]#*==}-${packages[1]#*==}
    if [[ ! -e $triton/.made ]]; then
        rm -rf "$triton"
        why=$("$python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --target "$triton/site" "${packages[@]}" 2>&1) ||
            cannot "${packages[*]} for $tag cannot be had from pip's index: ${why##*$'\n'}"
        touch "$triton/.made"
    fi
    # torch is not to load what .venv may hold, and no CANN of this machine is to be asked
    export TORCH_DEVICE_BACKEND_AUTOLOAD=0 LD_LIBRARY_PATH=$root/$folder/cann PYTHONPATH=$root/$folder/site:$root/$triton/site:$root
    export BISHENGIR=$root/$triton/site/ascendnpuir/bin/bishengir-compile
    unset ASCEND_HOME_PATH ASCEND_OPP_PATH
}

newest_for() { # TORCH: the newest torch_npu that goes with it, which has the most shape functions for fake tensors, and its triton-ascend
    awk -v torch="$1" '!/^#/ && ($2 == torch || index($2, torch ".post") == 1) { found = $2 " " $3 } END { print found }' \
        scripts/requirements/versions.txt
}

torch_version() { # of $python; torch-npu has the same
    "$python" -c 'from importlib.metadata import version; print(version("torch").partition("+")[0])'
}

without_noise() { # what torch_npu says of a machine that it does not know
    grep --line-buffered -vE 'ASCEND_HOME_PATH|data_ptr\(\) is null|falling back to its reference|NPUCachingAllocator.cpp' || true
}
