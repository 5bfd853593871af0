#!/usr/bin/env bash
# Lint: ruff with its formatting, mypy, shellcheck, hadolint. `.venv/bin/ruff format &&
# .venv/bin/ruff check --fix` mends most of it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need_venv
PATH=.venv/bin:$PATH
command -v shellcheck >/dev/null || die "shellcheck is missing: its package has no wheel for this machine, take the distribution's"
ruff check
ruff format --check
mypy
shellcheck -x -P SCRIPTDIR:. env.sh .ci/run scripts/*.sh
hadolint docker/Dockerfile
