#!/usr/bin/env bash
# Preflight: do the machines of a run agree (versions, code, settings, data, weights, a shared save
# folder), and how fast is an all-reduce over all of them? In seconds, without training. A run of
# several machines does the same before it starts.
#
#   HOSTS=<file> [CONFIG=<recipe>] scripts/preflight.sh [a.b=c …]
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [CONFIG=<recipe>] scripts/preflight.sh    on each machine
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec bash scripts/finetune.sh --preflight "$@"
