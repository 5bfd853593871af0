# shellcheck shell=bash
# Every environment variable of this project, and the one file to edit. Each line gives a default;
# what is set outside this file wins: `HCCL_CONNECT_TIMEOUT=300 make finetune`, `make finetune
# NODES=2`. A variable that is empty here stays unset. Values are checked before anything starts
# (scripts/check_env.sh). Paths are relative to the project's folder, or absolute. Keep the form of
# the lines: a plain NAME=value is refused, since it would be lost, or win over what is given.

# ── Models and data ───────────────────────────────────────────────────────────────────────────────

# The model that `make download` fetches if MODEL is not set outside this file, by its name on the
# hub: Qwen/Qwen3.5-4B. Default: none.
: "${DOWNLOAD_MODEL:=}"
# The hub. Default hf. Allowed: hf, modelscope.
: "${SOURCE:=hf}"
# A mirror of Hugging Face (a full address), and another site of ModelScope (a host name). Default:
# their own. Tokens for models that ask for one belong in the environment, not in this file:
# HF_TOKEN (or `hf auth login`), MODELSCOPE_API_TOKEN.
: "${HF_ENDPOINT:=}"
: "${MODELSCOPE_DOMAIN:=}"
# Hugging Face folder of the model, which `make convert` reads. Given on the command line, or for a
# checkpoint without a run's config.yaml beside it, also the folder whose config and tokenizer `make
# export` copies and `make generate` uses; otherwise they take the one that the run trained.
: "${HF:=ckpt/hf_path/tiny}"
# DCP folder. Given on the command line it stands for CONVERT_DCP in `make convert`, for EXPORT_DCP
# in `make export`.
: "${DCP:=}"
# What `make convert` writes: a folder with release/ and latest_checkpointed_iteration.txt, for
# training.load. Default: ckpt/mm_path/ and the name of HF.
: "${CONVERT_DCP:=}"
# What `make export` reads: a run's save folder (its newest checkpoint), or one folder iter_… or
# release.
: "${EXPORT_DCP:=runs/tiny}"
# Weights that must be tied, JSON {"one": "other"}: `make convert` checks it, and one copy serves
# both. Default: none. E.g. {"lm_head.weight": "model.language_model.embed_tokens.weight"}
: "${TIE:=}"
# Output. Given on the command line it stands for EXPORT_OUT in `make export`, for DATA_OUT in `make
# data`, for the file that `make predict` or `make logprobs` writes, and for the folder that `make
# download` fills, else ckpt/hf_path/ and the model's name.
: "${OUT:=}"
# Hugging Face folder that `make export` writes. Default: hf in the folder of the run.
: "${EXPORT_OUT:=}"
# What `make data` reads (the LLaVA description file, the folder of its images) and writes. With DATA
# on the command line it reads that instead, and says how long its samples are.
: "${LLAVA:=data/llava_instruct_150k.json}"
: "${IMAGES:=data/COCO2017/train2017}"
: "${DATA_OUT:=data/mllm_format_llava_instruct_data.json}"
# What `make generate`, `make predict` and `make evaluate` ask: a Hugging Face folder, or a DCP
# checkpoint as for EXPORT_DCP. Default: what `make export` writes.
: "${MODEL:=${OUT:-${EXPORT_OUT:-$EXPORT_DCP/hf}}}"
# The folder of the run for which `make report` writes a page, or of several with commas between
# them, for one page that compares them.
: "${RUN:=runs/tiny}"
# The records that `make predict` asks, and those with the right answers for `make evaluate`. Given
# on the command line, those with the answers for `make logprobs`, in place of the recipe's.
: "${DATA:=data/digits/heldout.json}"
# What `make generate` asks. Default: text on standard input. `<image>` in it is where an image
# belongs, `<video>` where a video.
: "${PROMPT:=}"
# Image files for `make generate`, with commas between them. Without an `<image>` in PROMPT they go
# before it. Default: none.
: "${IMAGE:=}"
# A video for `make generate`: a file, a folder of frames, or its frames with commas between them;
# `;` between several videos. Without a `<video>` in PROMPT they go before it, after the images.
# Default: none.
: "${VIDEO:=}"

# ── The run ───────────────────────────────────────────────────────────────────────────────────────

# The recipe that `make finetune` trains; configs/tiny.yaml and configs/lora/tiny.yaml make
# their own model and data first.
: "${CONFIG:=configs/tiny.yaml}"
# `make finetune`, `make show`: settings over those of the recipe, "training.train_iters=20
# training.lr=1e-4". Elsewhere: more options of the command, "--on_missing skip" for `make data`,
# "-k digits" for `make test`, "--only moe" for `make bench`, "--scaling" for `make rehearse`,
# "--small" for `make accept`.
: "${ARGS:=}"
# 1: `make install` and `make finetune` print what they would do, and do nothing. Default 0.
# Allowed: 0, 1.
: "${DRY_RUN:=0}"
# Machines that take part in one run. Default: what the scheduler of a cluster has set (Kubeflow,
# Volcano, MindCluster, ModelArts, Slurm), else 1. Allowed: from 1.
: "${NODES:=}"
# The number of this machine among them. Default 0; must be set where NODES > 1. Allowed: 0 to NODES
# - 1.
: "${NODE_RANK:=}"
# This machine's own address. Default: detected. It is also the default of HCCL_IF_IP, and in a run
# of several machines its network interface is the default of GLOO_SOCKET_IFNAME.
: "${NODE_ADDR:=}"
# Address of machine 0. Default localhost; must be set where NODES > 1.
: "${MASTER_ADDR:=}"
# Free port of machine 0. Default: 6000, or any free one for a single machine. Allowed: 1 to 65535.
: "${MASTER_PORT:=}"
# Seconds that a machine waits for the others before the run starts; the missing ones are then
# named. Default 300. Allowed: 1 to 86400.
: "${RENDEZVOUS_TIMEOUT:=300}"
# A secret that the launchers of a run prove to each other that they know before they exchange
# anything: the same on every machine, at least 16 characters, best exported so that no command line
# shows it. `openssl rand -hex 32` makes one. HOSTS and Slurm make their own. Default: none; then
# anyone who can reach MASTER_PORT can take a machine's place.
: "${RENDEZVOUS_SECRET:=}"
# A file of machines, one a line, "[user@]name [slots=8] [addr=10.0.0.1] [port=22]", machine 0
# first: `make finetune` then starts the run on all of them over ssh, with this machine's settings.
# Default: none, each machine is started by hand.
: "${HOSTS:=}"
# The project's folder on those machines, an absolute path. Default: the same as here.
: "${HOSTS_DIR:=}"
# The ssh that starts them, with options of its own: "ssh -F cluster.conf". It must not prompt.
# Default ssh.
: "${SSH:=ssh}"
# Processes on this machine, one an NPU. Default: all visible NPUs; 2 on a CPU; 8 for `make
# rehearse`. Allowed: from 1.
: "${NPUS_PER_NODE:=}"
# Gigabytes of memory of one NPU, for `make rehearse`. Default 64. Allowed: from 1.
: "${NPU_MEMORY_GB:=64}"
# A file of measured rates of an NPU and its links for `make rehearse`, as `make accept` writes it.
# Default: runs/accept/rates.yaml if it exists. Allowed: a file *.yaml, or none, which means the
# rates that the rehearsal states.
: "${RATES:=}"
# Which messages a run logs, to the console and to train.log in its save folder. DEBUG adds what each rank begins. Default INFO.
# Allowed: DEBUG, INFO, WARNING, ERROR.
: "${LOG_LEVEL:=INFO}"
# The NPUs that the run may use, "0,1,2,3". Default: all.
: "${ASCEND_RT_VISIBLE_DEVICES:=}"

# ── Installation ──────────────────────────────────────────────────────────────────────────────────

# Default: detected. Allowed: x86, arm.
: "${ARCH:=}"
# Default: npu where an NPU driver is, else cpu. Allowed: cpu, npu.
: "${DEVICE:=}"
# The Python that .venv is made with. Default: the first of python3, python3.11, python3.10,
# python3.12 that is 3.10-3.12.
: "${PYTHON:=}"
# Address of one more package index to install from. Default: none. DEVICE=npu ARCH=x86 needs
# PyTorch's own index of CPU wheels here, since torch-npu for x86_64 requires torch==2.7.1+cpu,
# which only that index has.
: "${TORCH_INDEX:=}"
# The CANN that DEVICE=npu installs for, "8.5" or "9.1.0"; scripts/requirements/versions.txt lists
# the torch_npu and triton-ascend that go with it. Default: the one in CANN_PATH, else 8.5. Set it
# where CANN is installed later, as in an image.
: "${CANN_VERSION:=}"
# The torch_npu of that table to install, "2.10.0.post6"; torch is of the same release. Default: the
# first that goes with CANN.
: "${TORCH_NPU:=}"
# The folder of CANN's set_env.sh, or the one above cann/ or ascend-toolkit/. On a CPU it need not
# exist.
: "${CANN_PATH:=/usr/local/Ascend}"

# ── Other versions (make test-versions) ───────────────────────────────────────────────────────────

# The release of transformers that the tests run on. Default 5.2.0, the oldest that has the model.
: "${TRANSFORMERS:=5.2.0}"
# A release of torch, 2.7.1 to 2.13: a whole environment of its own (several GB from pip's index on
# x86; TORCH_INDEX may name PyTorch's own index of CPU wheels), with the pins of an NPU
# installation. Default: the installed torch.
: "${TORCH:=}"

# ── CANN and torch_npu ────────────────────────────────────────────────────────────────────────────

# CANN's log on the console as well. Default 0. Allowed: 0 off, 1 on.
: "${ASCEND_SLOG_PRINT_TO_STDOUT:=0}"
# Level of CANN's application log. Default 3. Allowed: 0 debug, 1 info, 2 warning, 3 error, 4 none.
: "${ASCEND_GLOBAL_LOG_LEVEL:=3}"
# Optimisation of the queue that hands operators to the device. Default 2. Allowed: 0 off, 1 level
# 1, 2 level 2.
: "${TASK_QUEUE_ENABLE:=2}"
# Optimise pairs of operators that do not follow each other directly. Default 1. Allowed: 0 off, 1
# on.
: "${COMBINED_ENABLE:=1}"
# Bind the threads that launch operators to cores. Default 1. Allowed: 0 off, 1 coarse, 2 fine, each
# optionally with a range of cores an NPU: "1,npu0:0-1,npu1:2-5", and with npu_affine:, lazy_bind:,
# force: or bind_irq:, each 0 or 1.
: "${CPU_AFFINITY_CONF:=1}"
# The memory allocator, a comma-separated list of key:value. Default: segments that grow. Allowed
# keys: expandable_segments, max_split_size_mb, garbage_collection_threshold, base_addr_aligned_kb,
# page_size, segment_size_mb, multi_stream_lazy_reclaim, pin_memory_expandable_segments,
# pinned_mem_register, roundup_power2_divisions.
: "${PYTORCH_NPU_ALLOC_CONF:=expandable_segments:True}"
# Number of operators that the single-operator API keeps prepared on the host. Default 100000
# (CANN's own: 10000). Allowed: 1 to 10000000.
: "${ACLNN_CACHE_LIMIT:=100000}"
# Reuse memory across streams. Default 1. Allowed: 0 off, 1 on, 2 by keeping tensors alive (more
# memory, not recommended), 3 as 1, for tensors that are freed early too.
: "${MULTI_STREAM_MEMORY_REUSE:=1}"
# Watch gradients for silent data corruption. Default 0. Allowed: 0 off, 1 log only, 2 alarm, 3
# alarm and record.
: "${NPU_ASD_ENABLE:=0}"
# Wait for each operator: slow, but an error names its operator. Default 0. Allowed: 0 asynchronous,
# 1 wait.
: "${ASCEND_LAUNCH_BLOCKING:=0}"
# Where Triton keeps compiled kernels, for all processes of this machine and for later runs: best on
# a local disk, not in a home on the network. The folder must belong to this user alone; it is
# created. Default: below /tmp.
: "${TRITON_CACHE_DIR:=/tmp/qwen35-triton-$UID}"
# 1: sum in the same order in every matmul, for repeatable runs. Default: unset, 1 with
# training.deterministic. Allowed: 0, 1.
: "${CLOSE_MATMUL_K_SHIFT:=}"

# ── HCCL: communication between NPUs ──────────────────────────────────────────────────────────────

# Seconds that processes wait for each other's sockets. Default 1200 (HCCL's own: 120). Allowed: 120
# to 7200.
: "${HCCL_CONNECT_TIMEOUT:=1200}"
# Seconds that a collective waits for the slowest rank. Default 1800. Allowed: 68 to 17340.
: "${HCCL_EXEC_TIMEOUT:=1800}"
# Repeatable reductions. Default: unset, which is false, or true with training.deterministic.
# Allowed: true, false, strict.
: "${HCCL_DETERMINISTIC:=}"
# Network interfaces of HCCL, by name or its start: "eth0", "eth,end", "=eth0" exactly, "^lo" all
# but. Default: HCCL's choice.
: "${HCCL_SOCKET_IFNAME:=}"
# The same for gloo, CPU tensors and CPU runs, whole names. Default: the one of NODE_ADDR, else
# gloo's choice.
: "${GLOO_SOCKET_IFNAME:=}"
# This machine's address for HCCL, IPv4 or IPv6. Default: NODE_ADDR.
: "${HCCL_IF_IP:=$NODE_ADDR}"
# Megabytes of each communication buffer. Default: unset, HCCL's own 200. Allowed: from 1.
: "${HCCL_BUFFSIZE:=}"
# Where collectives are expanded into tasks. Default: unset, chosen by the device. Allowed: AI_CPU,
# AIV, HOST, HOST_TS.
: "${HCCL_OP_EXPANSION_MODE:=}"

# ── Host ──────────────────────────────────────────────────────────────────────────────────────────

# Threads inside the tokenizers; off, since the loader's workers are processes already. Default
# false. Allowed: true, false.
: "${TOKENIZERS_PARALLELISM:=false}"
# Threads of a process's own arithmetic. Default: on a CPU the cores shared among its processes; for
# `make generate`, `predict` and `evaluate` by the size of the model, one for a small one. Allowed:
# from 1.
: "${OMP_NUM_THREADS:=}"
# What a thread does while it waits for the others of its process: active, it spins; passive, it
# sleeps, which is faster on a busy machine. Default: passive for `make generate`, `predict` and
# `evaluate`, else OpenMP's own, active. Allowed: active, passive.
: "${OMP_WAIT_POLICY:=}"
# CPU runs only: keep freed memory instead of mapping each large tensor anew, much faster for more
# memory. In bytes; below the first a tensor comes from the heap, beyond the second free memory goes
# back. Defaults 32 GiB and 64 GiB.
: "${MALLOC_MMAP_THRESHOLD_:=34359738368}"
: "${MALLOC_TRIM_THRESHOLD_:=68719476736}"
