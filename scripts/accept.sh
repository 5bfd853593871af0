#!/usr/bin/env bash
# What to run first on a real machine, about ten minutes: doctor; every kernel against its
# definition; a layer of each kind and a training step beside the CPU; collectives, and several
# ranks beside one; a run that is killed and resumed; speed and memory of a slice of Qwen3.5-4B
# beside its rehearsal. Nothing is downloaded but what the rehearsal stands on
# (scripts/rehearse.sh).
#
#   [NPUS_PER_NODE=8] [ARGS="--only operators layers | --out FOLDER | --small"] scripts/accept.sh [the same options]
#
# The report is runs/accept/<host>-<date>.md, to be read or pasted into an issue (no paths,
# addresses or secrets are in it), and the same as .json. On NPUs the rates that were measured are
# runs/accept/rates.yaml, which `make rehearse` takes from then on. Exit status 1: something is off.
# Slower than `make rehearse` assumes is not off.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
split "${ARGS:-}"
unset NODES NODE_RANK HOSTS # this machine alone
exec "$python" -m accept "${words[@]}" "$@"
