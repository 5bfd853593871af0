# shellcheck shell=bash
# Sourced by scripts that start something: checks that every variable that is set has an allowed
# value. The first wrong one stops the script.

# Ranges of what torch_npu reads are from its own sources. OptionsManager.cpp takes
# MULTI_STREAM_MEMORY_REUSE from 0 to 3 (7.3.0 to 26.1.0). NPUAffinityController.cpp takes mode:,
# npu_affine: and lazy_bind: in CPU_AFFINITY_CONF from 7.3.0 on, force: from 26.1.0 on and bind_irq:
# from 26.2.0 on; an older release ignores those it does not know.
env_rules() { # NAME int FROM TO | NAME one WORD… | NAME like REGEX what that means; a bound of - is none
    cat <<'RULES'
ASCEND_GLOBAL_LOG_LEVEL      int 0 4
ASCEND_LAUNCH_BLOCKING       int 0 1
ASCEND_SLOG_PRINT_TO_STDOUT  int 0 1
ACLNN_CACHE_LIMIT            int 1 10000000
CLOSE_MATMUL_K_SHIFT         int 0 1
COMBINED_ENABLE              int 0 1
HCCL_BUFFSIZE                int 1 -
HCCL_CONNECT_TIMEOUT         int 120 7200
HCCL_EXEC_TIMEOUT            int 68 17340
MASTER_PORT                  int 1 65535
MULTI_STREAM_MEMORY_REUSE    int 0 3
NODES                        int 1 -
NODE_RANK                    int 0 -
NPUS_PER_NODE                int 1 -
NPU_ASD_ENABLE               int 0 3
NPU_MEMORY_GB                int 1 -
OMP_NUM_THREADS              int 1 -
RENDEZVOUS_TIMEOUT           int 1 86400
MALLOC_MMAP_THRESHOLD_       int 0 -
MALLOC_TRIM_THRESHOLD_       int 0 -
TASK_QUEUE_ENABLE            int 0 2
DRY_RUN                      int 0 1
ARCH                         one x86 arm
DEVICE                       one cpu npu
SOURCE                       one hf modelscope
LOG_LEVEL                    one DEBUG INFO WARNING ERROR
HCCL_DETERMINISTIC           one true false strict
OMP_WAIT_POLICY              one active passive
HCCL_OP_EXPANSION_MODE       one AI_CPU AIV HOST HOST_TS
TOKENIZERS_PARALLELISM       one true false True False TRUE FALSE
ASCEND_RT_VISIBLE_DEVICES    like ^[0-9]+(,[0-9]+)*$ NPU numbers with commas between them, 0,1,2,3
CPU_AFFINITY_CONF            like ^(mode:)?[0-2](,(npu[0-9]{1,2}:[0-9]+-[0-9]+|(npu_affine|lazy_bind|force|bind_irq):[01]))*$ 0, 1 or 2, perhaps after mode:, and perhaps ranges of cores and switches, 1,npu0:0-1,npu1:2-5,npu_affine:1
GLOO_SOCKET_IFNAME           like ^[A-Za-z0-9_.:@-]+(,[A-Za-z0-9_.:@-]+)*$ names of network interfaces, eth0,eth1
HCCL_SOCKET_IFNAME           like ^[=^]{0,2}[A-Za-z0-9_.:@-]+(,[A-Za-z0-9_.:@-]+)*$ names of network interfaces, eth0,eth1, perhaps after = or ^
CANN_VERSION                 like ^[0-9]+\.[0-9]+([.-][A-Za-z0-9.-]+)?$ a release of CANN, 8.5 or 9.1.0
TORCH_NPU                    like ^[0-9]+(\.[0-9]+)*(\.post[0-9]+)?$ a release of torch_npu, 2.7.1.post2
RATES                        like ^(none|.+\.yaml)$ a file *.yaml that make accept wrote, or none
TORCH                        like ^[0-9]+(\.[0-9]+)*$ a version, 2.7.1
TRANSFORMERS                 like ^[0-9]+(\.[0-9]+)*$ a version, 5.2.0
HOSTS_DIR                    like ^/ the absolute path of a folder
HF_ENDPOINT                  like ^https?://[A-Za-z0-9._:/-]+$ an address, https://…
MODELSCOPE_DOMAIN            like ^(https?://)?[A-Za-z0-9._:-]+$ a host name
HCCL_IF_IP                   like ^([0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9A-Fa-f:]*:[0-9A-Fa-f:.%a-z]*)$ an IPv4 or IPv6 address
MASTER_ADDR                  like ^[A-Za-z0-9_.:%-]+$ a host name or an address
NODE_ADDR                    like ^[A-Za-z0-9_.:%-]+$ a host name or an address
RULES
}

alloc_conf_keys='expandable_segments:(True|False)
max_split_size_mb:[0-9]+
garbage_collection_threshold:0?\.[0-9]+
base_addr_aligned_kb:([0-9]|1[0-6])
page_size:1g
segment_size_mb:[0-9]+
multi_stream_lazy_reclaim:(True|False)
pin_memory_expandable_segments:(True|False)
pinned_mem_register:(True|False)
roundup_power2_divisions:([0-9]+|\[[^]]*\])'

check_env() {
    local name kind allowed
    while read -r name kind allowed; do
        if [[ -n ${!name:-} ]]; then "check_$kind" "$name" "${!name}" "$allowed"; fi
    done < <(env_rules)
    # shellcheck disable=SC2154 # common.sh has the names; a ~ that no shell has expanded would be the name of a folder
    for name in "${env_names[@]}"; do
        [[ ${!name:-} != \~/* || $name == PROMPT ]] || wrong "$name" "${!name}" "a path without ~"
    done
    check_alloc_conf
}

check_triton_cache() { # for what runs kernels
    if [[ -e ${TRITON_CACHE_DIR:-} && ! (-d $TRITON_CACHE_DIR && -O $TRITON_CACHE_DIR) ]]; then
        wrong TRITON_CACHE_DIR "$TRITON_CACHE_DIR" "a folder of this user, or one that is not there yet: programs are loaded from it"
    fi
}

wrong_values() ( # each wrong value as a line, for who wants to know them all
    # shellcheck disable=SC2329 # check_env calls it
    die() { echo "$*"; }
    check_env
    check_triton_cache
    check_nodes
)

check_int() {
    local low=${3% *} high=${3#* }
    # 15 digits at most, so that no comparison overflows
    if [[ $2 =~ ^(0|[1-9][0-9]{0,14})$ ]] && (($2 >= low)) && [[ $high == - || $2 -le $high ]]; then return; fi
    if [[ $high == - ]]; then wrong "$1" "$2" "a whole number from $low"; else wrong "$1" "$2" "a whole number from $low to $high"; fi
}

check_one() {
    [[ " $3 " == *" $2 "* ]] || wrong "$1" "$2" "one of ${3// /, }"
}

check_like() {
    [[ $2 =~ ${3%% *} ]] || wrong "$1" "$2" "${3#* }"
}

check_alloc_conf() {
    local value=${PYTORCH_NPU_ALLOC_CONF:-} keys=${alloc_conf_keys//$'\n'/|}
    [[ -z $value || $value =~ ^($keys)(,($keys))*$ ]] ||
        wrong PYTORCH_NPU_ALLOC_CONF "$value" "a comma list of key:value like ${alloc_conf_keys//$'\n'/ }"
}

check_nodes() { # for what starts a run: the values that depend on each other
    local nodes=${NODES:-1} rank=${NODE_RANK:-0} name
    if [[ ! $nodes =~ ^[0-9]+$ || ! $rank =~ ^[0-9]+$ ]]; then return; fi # wrong by themselves
    if ((nodes > 1)) && [[ -z ${HOSTS:-} ]]; then # which says where each machine is
        for name in MASTER_ADDR NODE_RANK; do
            [[ -n ${!name:-} ]] || die "$name is not set, and NODES=$nodes needs it: the same MASTER_ADDR on every machine, NODE_RANK 0 to $((nodes - 1))"
        done
    fi
    [[ -z ${NNODES:-} || $NNODES == "$nodes" ]] || die "NNODES=$NNODES contradicts NODES=$nodes: the number of machines is NODES here, set that"
    ((rank < nodes)) || wrong NODE_RANK "$NODE_RANK" "a whole number from 0 to $((nodes - 1)), since NODES=$nodes"
}

wrong() { # NAME VALUE ALLOWED
    die "$1=${2//$'\n'/ }: must be $3"
}
