#!/usr/bin/env bash
# Developer's tool: resolve scripts/requirements/*.in into the exact pins that `make install`
# installs.
#
#   pip install uv && bash scripts/lock.sh            keep the pins that still fit, add what is missing
#   pip install uv && bash scripts/lock.sh --upgrade  the newest of everything
#
# One file serves Python 3.10 to 3.12 (markers say which pin is whose) and both architectures.
# pyproject.toml, [tool.uv], tells uv what torch needs on a machine without CUDA; that is why no
# CUDA package is pinned.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

uv=$(command -v uv || true)
[[ -n $uv ]] || uv=.venv/bin/uv
[[ -x $uv ]] || die "uv is not here: pip install uv"

lock() { # lock IN OUT [options]: OUT is also read, for its pins
    local file=scripts/requirements/$2
    "$uv" pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --no-emit-index-url \
        "${@:3}" --output-file "$file" "scripts/requirements/$1" >/dev/null
    # what holds wherever this is installed need not be said in every line
    sed -i -e '/^#/d' -e "s/python_full_version < '3.13' and //; s/ and sys_platform == 'linux'//g; s/ ; sys_platform == 'linux'$//" \
        -e "1i # made by scripts/lock.sh from $1: Python 3.10 to 3.12 on Linux" "$file"
}

lock cpu.in cpu.txt "$@"
lock npu.in npu-arm.txt "$@"
sed 's|^torch==[0-9.]*|&+cpu|' scripts/requirements/npu-arm.txt >scripts/requirements/npu-x86.txt
wc -l scripts/requirements/*.txt
