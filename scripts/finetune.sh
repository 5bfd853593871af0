#!/usr/bin/env bash
# Fine-tune: check the environment, then start one process an NPU (two on a CPU) on this machine.
#
#   CONFIG=<recipe> [ARGS="a.b=c …"] scripts/finetune.sh [a.b=c …]    settings over the recipe's: docs/settings.md
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [MASTER_PORT=6000 NODE_ADDR=… NPUS_PER_NODE=8] scripts/finetune.sh    on each machine
#   HOSTS=<file> [HOSTS_DIR=<folder there> SSH="ssh -F …"] scripts/finetune.sh    on one machine, which starts all over ssh
#   DRY_RUN=1 scripts/finetune.sh    print the command, and do not run it
#
# In a job of Kubeflow, Volcano, MindCluster, ModelArts or Slurm, which starts it on each machine, it
# needs none of these variables. Exit status 143 (130 after Ctrl-C): stopped before the last step.
#
# With configs/tiny.yaml, the default, and with configs/lora/tiny.yaml model and data are made first,
# and the trained model is tested (scripts/tiny.sh).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
ready
check_nodes
[[ -f $CONFIG ]] || die "CONFIG=$CONFIG: no such file; there are $(echo configs/*.yaml configs/*/*.yaml)"
instead=() # of training
if [[ ${1:-} == --preflight ]]; then # see preflight.sh
    instead=("$1")
    shift
elif [[ ${1:-} == --logprobs ]]; then # see logprobs.sh
    instead=("$1" "$2")
    shift 2
fi
split "${ARGS:-}"
overrides=("${words[@]}" "$@")
if help_in "${overrides[@]}"; then exec bash "$0" --help; fi
if [[ -n ${HOSTS:-} && -z ${QWEN35_NODE:-} ]]; then
    need_venv # for a dry run as well: Python reads the file
    exec "$python" -m qwen35.launch.hosts "${instead[@]}" --variables "${env_names[*]}" -- "$HOSTS" "$CONFIG" "${overrides[@]}"
fi

visible_npus() {
    if [[ -n ${ASCEND_RT_VISIBLE_DEVICES:-} ]]; then
        tr ',' '\n' <<<"$ASCEND_RT_VISIBLE_DEVICES" | wc -l
    else
        find /dev -maxdepth 1 -name 'davinci[0-9]*' | wc -l
    fi
}

case $(device) in
    cpu)
        processes=${NPUS_PER_NODE:-2}
        cores=$(nproc)
        threads=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
        ;;
    npu)
        visible=$(visible_npus)
        processes=${NPUS_PER_NODE:-$visible}
        ((processes > 0)) || die "no NPU is visible here; NPUS_PER_NODE says how many to use, DEVICE=cpu trains without"
        # where no device file is seen, in some containers, the processes find out how many there are
        ((visible == 0 || processes <= visible)) ||
            die "NPUS_PER_NODE=$processes, but $visible NPUs are visible here${ASCEND_RT_VISIBLE_DEVICES:+ (ASCEND_RT_VISIBLE_DEVICES=$ASCEND_RT_VISIBLE_DEVICES)}: one process each"
        ;;
esac

launcher=(env ${threads:+OMP_NUM_THREADS="$threads"} "$python" -m qwen35.launch ${NODES:+--nnodes "$NODES" --node_rank "${NODE_RANK:-0}"}
    --nproc_per_node "$processes" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${MASTER_PORT:+--master_port "$MASTER_PORT"}
    --rendezvous_timeout "$RENDEZVOUS_TIMEOUT" "${instead[@]}")
train=("${launcher[@]}" "$CONFIG" "${overrides[@]}")

if [[ $DRY_RUN == 1 ]]; then
    printf '%q ' "${train[@]}"
    echo
    exit
fi
if [[ ($CONFIG -ef configs/tiny.yaml || $CONFIG -ef configs/lora/tiny.yaml) && ${#instead[@]} == 0 ]]; then
    exec bash scripts/tiny.sh "$CONFIG" "${overrides[@]}" -- "${launcher[@]}"
fi
# what make started ends with it, kill -9 included; what a shell started outlives that
if [[ $(cat "/proc/$PPID/comm" 2>/dev/null) == make ]]; then export QWEN35_PARENT=$PPID; fi
exec "${train[@]}"
