#!/usr/bin/env bash
# Install the exact pins for this machine, and qwen35 itself, into .venv.
#
#   scripts/install.sh [--arch x86|arm] [--device cpu|npu] [--msid COMMIT] [--dry-run]
#
#   --arch, ARCH       default: detected
#   --device, DEVICE   default: npu where an NPU driver is, else cpu
#   CANN_VERSION       npu: the CANN to install for; default: the one in CANN_PATH, else 8.5 (scripts/requirements/versions.txt)
#   TORCH_NPU          npu: another torch_npu that goes with it; default: the first of that table
#   --dry-run, DRY_RUN=1   print what would be installed, and touch nothing; then ARCH may be another machine's
#   --msid             accepted as in older guides; there is nothing for it to pin here
#   PYTHON             the Python to make .venv with, 3.10 to 3.12
#   TORCH_INDEX        address of one more package index (npu on x86 needs PyTorch's own, for torch 2.7.1+cpu)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
    case $1 in
        --dry-run) DRY_RUN=1 ;;
        --arch | --device | --msid)
            (($# > 1)) || die "$1 needs a value"
            case $1 in
                --arch) ARCH=$2 ;;
                --device) DEVICE=$2 ;;
                --msid) echo "--msid $2: nothing to pin here, the lock file has every version; going on" ;;
            esac
            shift
            ;;
        *) die "$1: unknown; --help shows the options" ;;
    esac
    shift
done

machine_arch() {
    case $(uname -m) in
        x86_64 | amd64) echo x86 ;;
        aarch64 | arm64) echo arm ;;
        *) die "$(uname -m): there is no lock file for this machine; ARCH may be x86 or arm" ;;
    esac
}

read_stack() { # the row of scripts/requirements/versions.txt: stack, what to know about kernels, and the lock's pins for it
    local home answer elsewhere=()
    home=$(load_cann >/dev/null 2>&1 && echo "${ASCEND_HOME_PATH:-}") || true
    if [[ ${DRY_RUN:-0} == 1 ]]; then elsewhere=(--elsewhere); fi
    answer=$(PYTHONDONTWRITEBYTECODE=1 "$python_base" -m qwen35.tools.stack "$lock" --home "$home" \
        --cann "${CANN_VERSION:-}" --torch_npu "${TORCH_NPU:-}" "${elsewhere[@]}") || exit 2
    { read -r cann torch_npu origin && read -r about_kernels && pins=$(cat); } <<<"$answer"
}

print_pins() { # as pip on that Python and architecture would read their markers
    "$python_base" - "$pins" "$arch" <<'PY'
import signal
import sys

pins, arch = sys.argv[1:]
machine = {"x86": "x86_64", "arm": "aarch64"}[arch]
try:
    from pip._vendor.packaging.markers import Marker
except ImportError:  # no pip beside this Python: print the markers
    Marker = None
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` has seen enough
for line in pins.splitlines():
    pin, _, marker = (part.strip() for part in line.partition(";"))
    if not pin or pin.startswith("#"):
        continue
    if Marker is None:
        print(f"  {line.strip()}")
    elif not marker or Marker(marker).evaluate({"platform_machine": machine, "sys_platform": "linux"}):
        print(f"  {pin}")
PY
}

source scripts/check_env.sh
check_env
host=$(machine_arch)
arch=${ARCH:-$host}
device=${DEVICE:-$(detect_device)}
python_base=$(find_python python3 python3.11 python3.10 python3.12)
version=$("$python_base" -c 'import platform; print(platform.python_version())')
case $device in
    cpu) lock=scripts/requirements/cpu.txt pins=$(<scripts/requirements/cpu.txt) ;;
    npu)
        lock=scripts/requirements/npu-$arch.txt
        read_stack
        ;;
esac
need_index=
if [[ $device-$arch == npu-x86 && -z ${TORCH_INDEX:-} ]]; then
    need_index="TORCH_INDEX is empty, and npu on x86 needs it: torch-npu for x86_64 requires torch==${torch_npu%.post*}+cpu, which only PyTorch's own index of CPU wheels carries; set its address in env.sh"
fi

if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%-8s %s\n' python "$python_base ($version)" arch "$arch" device "$device" lock "$lock" index "pip's own${TORCH_INDEX:+, and $TORCH_INDEX}"
    if [[ $device == npu ]]; then printf '%-8s %s\n' cann "$cann ($origin)" kernels "${about_kernels:-all}"; fi
    print_pins
    [[ -z $need_index ]] || die "$need_index"
    exit
fi
[[ -z $need_index ]] || die "$need_index"
[[ $arch == "$host" ]] || die "ARCH=$arch, but this machine is $host; DRY_RUN=1 prints what would be installed there"

# The stamp goes first and comes back last: an install that stops half-way never looks whole. A
# .venv of the same kind is brought up to date in place, any other is made anew.
kind=$device-$arch${torch_npu:+-$torch_npu}-$version
found=$(.venv/bin/python -c 'import pip, platform; print(platform.python_version())' 2>/dev/null || true)
rm -f .venv/.installed
if [[ $kind == "$(cat .venv/.kind 2>/dev/null || echo "$device-$arch-$found")" && $kind == *-"$found" ]]; then
    echo "[1/3] .venv is there already"
else
    echo "[1/3] .venv with Python $version ($python_base)"
    "$python_base" -m venv --clear .venv
fi
echo "$kind" >.venv/.kind
echo "[2/3] the pins of $lock${cann:+ for CANN $cann ($origin)} (torch takes longest)"
.venv/bin/python "${pip[@]}" --requirement <(echo "$pins") ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
echo "[3/3] qwen35 itself"
.venv/bin/python "${pip[@]}" --no-deps --no-build-isolation --editable .
echo "$kind" >.venv/.installed
.venv/bin/python - "$device" "$SECONDS" <<'PY'
import platform
import sys
from importlib.metadata import version

device, seconds = sys.argv[1:]
packages = ["torch", "transformers"] + ["torch-npu"] * (device == "npu")
print(f"installed in {seconds} s: python {platform.python_version()},", ", ".join(f"{p} {version(p)}" for p in packages) + f", device {device}")
PY
[[ -z ${about_kernels:-} ]] || echo "$about_kernels"
