#!/usr/bin/env bash
# The layouts of a recipe that are fastest and fit, by predicted seconds a step: how weights, experts
# and sequences are shared, how a step is cut into micro-batches, what is recomputed or kept on the
# host. Prints a table and the lines for the recipe; minutes, as the best are rehearsed, once each.
#
#   CONFIG=<recipe> [NODES=1] [NPUS_PER_NODE=8] [NPU_MEMORY_GB=64] [TOKENS_PER_STEP=<the recipe's>] [RATES=<file>|none]
#       [ARGS="a.b=c … --images 0.25 …"] scripts/plan.sh [the same]
#   … scripts/plan.sh --help                 this; ARGS=--help lists all options
#
# What it needs, and what a rehearsal does not prove: scripts/rehearse.sh --help.
# shellcheck disable=SC2034 # rehearse.sh reads it
module=rehearse.plan
source "$(dirname "${BASH_SOURCE[0]}")/rehearse.sh"
