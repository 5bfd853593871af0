#!/usr/bin/env bash
# One whole training step of a recipe on a virtual cluster of NPUs, on any machine, in less than a
# minute: memory by what holds it, operators, collectives with their bytes, a range for the step's
# time. Fails on an operator without a kernel for NPUs, on a host sync that is not allowed, on a
# peak over NPU_MEMORY_GB.
#
#   CONFIG=<recipe> [NODES=1] [NPUS_PER_NODE=8] [NPU_MEMORY_GB=64] [RATES=<file>|none] [ARGS="a.b=c … --images 0.25 …"]
#       scripts/rehearse.sh [the same]
#   … scripts/rehearse.sh --scaling          what is sent, on 16 to 1,024 NPUs
#   … scripts/rehearse.sh --help             this; ARGS=--help lists all options
#
# Needs no data and no weights, only the model's config.json; where that is missing, the published one
# of the same size is taken. torch-npu and triton-ascend come from pip's index (300 MB, kept below
# build/npu, as for make test-npu). Exit status 3: they cannot be had, and nothing was rehearsed.
# Not proved: speed, HCCL, and CANN's own bugs.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source scripts/check_env.sh
source scripts/stand_ins.sh
what_is_done=rehearsed module=${module:-rehearse}
nodes=${NODES:-1}
unset NODES NODE_RANK # nobody is to be met
check_int NODES "$nodes" "1 -"
check_env
need_venv
split "${ARGS:-}"
if help_in "${words[@]}"; then exec "$python" -m "$module" --help; fi # before anything is made or downloaded
if [[ ($CONFIG -ef configs/tiny.yaml || $CONFIG -ef configs/lora/tiny.yaml) && ! -e ckpt/hf_path/tiny/config.json ]]; then
    "$python" -m qwen35.tools.tiny
fi
if [[ $CONFIG -ef configs/lora/tiny.yaml && ! -e runs/tiny_base/hf/config.json ]]; then # whose config.json is the same
    words=(model.model_name_or_path=ckpt/hf_path/tiny "${words[@]}")
fi
per_node=${NPUS_PER_NODE:-8} memory=$NPU_MEMORY_GB config=$CONFIG buffer=${HCCL_BUFFSIZE:-}
rates=${RATES:-} tokens=
if [[ $module == rehearse.plan ]]; then tokens=${TOKENS_PER_STEP:-}; fi
if [[ -z $rates && -e runs/accept/rates.yaml ]]; then rates=runs/accept/rates.yaml; fi
if [[ $rates == none ]]; then rates=; fi
make_stand_ins "$(torch_version)"
unset "${env_names[@]}"
if [[ -n $buffer ]]; then export HCCL_BUFFSIZE=$buffer; fi
export TRITON_INTERPRET=1 # nothing is compiled
"$python" -W ignore -m "$module" "$config" --nodes "$nodes" --npus-per-node "$per_node" --memory-gb "$memory" ${rates:+--rates "$rates"} \
    ${tokens:+--tokens-per-step "$tokens"} "${words[@]}" "$@" \
    2> >(without_noise >&2) | without_noise
