# shellcheck shell=bash
# Sourced by every script: --help, the project's folder as working folder, env.sh exported, and a
# few small functions.
set -euo pipefail

die() { # one line on stderr
    echo "$(basename "$0"): $*" >&2
    exit 2
}

root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
if [[ ${1:-} == --help || ${1:-} == -h ]]; then # the comment at the head of the script
    sed -n -e '1d; /^#/!q; s/^# \{0,1\}//p' "$0"
    echo
    echo "Relative paths are below $root; env.sh there describes every variable, with its default."
    exit
fi
cd "$root"
# shellcheck disable=SC2034 # for the scripts that source this
python=.venv/bin/python

source ./env.sh
mapfile -t env_names < <(sed -n 's/^: "${\([A-Za-z0-9_]*\):=.*/\1/p' env.sh)
# a plain assignment reaches nothing that is started, and one of these names wins over what is given
if plain=$(grep -nEm1 "^ *([A-Za-z_][A-Za-z0-9_]*|export +($(IFS='|' && echo "${env_names[*]}")))=" env.sh); then
    line=${plain#*:} line=${line##*export }
    die "env.sh, line ${plain%%:*}: $line would be lost, or win over what is given elsewhere; write : \"\${${line%%=*}:=${line#*=}}\""
fi
# a line of another form is not exported, and of two lines for one variable the first wins
wrong=$(awk '
    /^ *:/ && !/^: "\$\{[A-Za-z0-9_]+:=/ { print FNR ": " $0 " would not be exported; write : \"${NAME:=value}\""; exit }
    match($0, /^: "\$\{[A-Za-z0-9_]+/) && seen[name = substr($0, 6, RLENGTH - 5)]++ {
        print FNR ": " name " stands above already, and what stands first counts; change that line"; exit
    }' env.sh)
[[ -z $wrong ]] || die "env.sh, line $wrong"
for name in "${env_names[@]}"; do
    if [[ -n ${!name} ]]; then export "${name?}"; else unset "$name"; fi
done

detect_device() { # npu where a driver is
    if [[ -e /dev/davinci_manager || -e /dev/davinci0 ]] || command -v npu-smi >/dev/null; then echo npu; else echo cpu; fi
}

device() { # what is asked for, else what is installed, else what is there
    local installed=
    if [[ -e .venv/.installed ]]; then installed=$(cut -d- -f1 .venv/.installed); fi
    echo "${DEVICE:-${installed:-$(detect_device)}}"
}

usable() { # PYTHON: 3.10 to 3.12, able to make an environment with pip; prints its own path, from inside an environment too
    "$1" -c '
import ensurepip, sys, venv
assert (3, 10) <= sys.version_info[:2] <= (3, 12)
print(sys._base_executable)' 2>/dev/null
}

find_python() { # CANDIDATE…: PYTHON if it is set, else the first usable one
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" || die "PYTHON=$PYTHON: not a Python 3.10 to 3.12 with venv and pip"
        return
    fi
    for candidate in "$@"; do
        if usable "$candidate"; then return; fi
    done
    die "no Python 3.10 to 3.12 with venv and pip is on PATH: install one (its python3-venv too), or set PYTHON=/path/to/python3.11"
}

split() { # TEXT into the array words, as a shell would: quotes honoured, nothing expanded
    local lines
    lines=$(xargs -rn1 printf '%s\n' <<<"$1" 2>/dev/null) || die "ARGS=$1: a quote is not closed; close it"
    words=()
    # shellcheck disable=SC2034 # read by the caller
    if [[ -n $lines ]]; then mapfile -t words <<<"$lines"; fi
}

pip=(-m pip install -qq --disable-pip-version-check --no-input)
is_made() { # FOLDER OLDER: a finished environment, younger than what it was made from
    [[ -e $1/.made && ! $2 -nt $1/.made ]]
}

beside_venv() { # FOLDER OLDER WHAT…: an environment that pip installs WHAT into; all else it finds in .venv, behind
    local folder=$1 older=$2 site
    shift 2
    if is_made "$folder" "$older" && is_made "$folder" .venv/.installed; then return; fi
    echo "making $folder"
    "$python" -m venv --clear "$folder"
    site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/behind.pth"
    "$folder/bin/python" "${pip[@]}" "$@"
    touch "$folder/.made"
}

await() { # PID: until it has ended; its exit status is in `code`. A trap that may interrupt this sets `interrupted`
    interrupted=1
    while [[ -n $interrupted ]]; do
        interrupted='' code=0
        wait "$1" || code=$?
    done
    ((code >= 0)) || code=143 # bash loses the status of a process that ends in the moment of the signal
}

load_cann() { # CANN's environment, where it is; its scripts use unbound variables and failing commands
    local file
    for file in "$CANN_PATH"/{,cann/,ascend-toolkit/}set_env.sh; do
        [[ -f $file ]] || continue
        set +eu
        # shellcheck disable=SC1090
        source "$file"
        set -eu
        return
    done
    if [[ $(device) == npu && -z ${ASCEND_HOME_PATH:-} ]]; then
        die "CANN_PATH=$CANN_PATH: no set_env.sh there, nor in cann/ or ascend-toolkit/ below it; install CANN, or set CANN_PATH to its folder"
    fi
}

help_in() { # WORD…: is --help among what ARGS and the command line give?
    [[ " $* " == *" --help "* ]]
}

converted() { # the folder that `make convert` writes
    echo "${DCP:-${CONVERT_DCP:-ckpt/mm_path/$(basename "$(realpath -ms "$HF")")}}"
}

run_folder() { # of the checkpoint that `make export` reads: the folder above iter_… or release
    local folder=${DCP:-$EXPORT_DCP}
    folder=${folder%/}
    if [[ ${folder##*/} =~ ^(iter_[0-9]+|release)$ ]]; then dirname "$folder"; else echo "$folder"; fi
}

exported() { # the folder that `make export` writes
    echo "${OUT:-${EXPORT_OUT:-$(run_folder)/hf}}"
}

need_venv() {
    [[ -e .venv/.installed ]] || die "nothing is installed yet: run make install"
}

device_env() { # what a run's environment owes to the device
    if [[ $(device) == npu ]]; then
        unset MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_
    else # even where torch would find an accelerator
        export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-}" TORCH_DEVICE_BACKEND_AUTOLOAD=0
    fi
}

asks() { # `ready` for what generates: its threads wait for each other in every operator, and sleep meanwhile
    ready # one that spins keeps a busy machine from running what it waits for
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
}

ready() { # what every script that runs kernels does first
    source scripts/check_env.sh
    check_env
    check_triton_cache
    load_cann
    device_env
    [[ $DRY_RUN == 1 ]] || need_venv
}
