"""env.sh, its checks and every command: the real scripts, with a python that records its words."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p.name for p in (ROOT / "scripts").glob("*.sh") if os.access(p, os.X_OK))
Run = Callable[..., "subprocess.CompletedProcess[str]"]

SEED_TABLE = """ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_GLOBAL_LOG_LEVEL TASK_QUEUE_ENABLE COMBINED_ENABLE CPU_AFFINITY_CONF
    HCCL_CONNECT_TIMEOUT PYTORCH_NPU_ALLOC_CONF HCCL_EXEC_TIMEOUT ACLNN_CACHE_LIMIT TOKENIZERS_PARALLELISM
    MULTI_STREAM_MEMORY_REUSE NPU_ASD_ENABLE ASCEND_LAUNCH_BLOCKING NPUS_PER_NODE
    MASTER_ADDR MASTER_PORT NODE_ADDR NODE_RANK NODES""".split()
OTHERS = """HCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME HCCL_IF_IP HCCL_BUFFSIZE HCCL_OP_EXPANSION_MODE HCCL_DETERMINISTIC
    ASCEND_RT_VISIBLE_DEVICES CLOSE_MATMUL_K_SHIFT CANN_PATH CANN_VERSION TORCH_NPU TORCH_INDEX PYTHON TORCH TRANSFORMERS
    OMP_NUM_THREADS MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ HF DCP TIE OUT LLAVA IMAGES CONFIG MODEL DATA PROMPT IMAGE
    OMP_WAIT_POLICY VIDEO ARGS SOURCE HF_ENDPOINT MODELSCOPE_DOMAIN DOWNLOAD_MODEL RENDEZVOUS_TIMEOUT RENDEZVOUS_SECRET HOSTS
    HOSTS_DIR SSH RATES TRITON_CACHE_DIR LOG_LEVEL""".split()

BOUNDS = {
    "ASCEND_GLOBAL_LOG_LEVEL": (0, 4),
    "ASCEND_LAUNCH_BLOCKING": (0, 1),
    "ASCEND_SLOG_PRINT_TO_STDOUT": (0, 1),
    "ACLNN_CACHE_LIMIT": (1, 10_000_000),
    "CLOSE_MATMUL_K_SHIFT": (0, 1),
    "COMBINED_ENABLE": (0, 1),
    "CPU_AFFINITY_CONF": (0, 2),
    "HCCL_CONNECT_TIMEOUT": (120, 7200),
    "HCCL_EXEC_TIMEOUT": (68, 17340),
    "MASTER_PORT": (1, 65535),
    "MULTI_STREAM_MEMORY_REUSE": (0, 3),
    "NPU_ASD_ENABLE": (0, 3),
    "RENDEZVOUS_TIMEOUT": (1, 86400),
    "TASK_QUEUE_ENABLE": (0, 2),
}
LOW = {name: str(low) for name, (low, _) in BOUNDS.items()}
HIGH = {name: str(high) for name, (_, high) in BOUNDS.items()}
GOOD = [
    LOW,
    HIGH,
    {"TOKENIZERS_PARALLELISM": "True", "HCCL_DETERMINISTIC": "strict", "HCCL_OP_EXPANSION_MODE": "AIV"},
    {"TOKENIZERS_PARALLELISM": "false", "HCCL_IF_IP": "fe80::1", "HCCL_SOCKET_IFNAME": "^lo,docker"},
    {"CPU_AFFINITY_CONF": "1,npu0:0-1,npu1:2-5", "HCCL_IF_IP": "10.0.0.2", "HCCL_SOCKET_IFNAME": "=eth0"},
    {"CPU_AFFINITY_CONF": "mode:2,force:1,npu0:0-3,npu15:4-7", "CANN_VERSION": "9.2.0-beta.2", "TORCH_NPU": "2.10.0"},
    {"CPU_AFFINITY_CONF": "2,npu_affine:1,lazy_bind:0,bind_irq:1", "CANN_VERSION": "8.5", "TORCH_NPU": "2.7.1.post2"},
    {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:512,garbage_collection_threshold:0.8"},
    {"OMP_WAIT_POLICY": "active"},
    {"NPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1", "HCCL_BUFFSIZE": "400", "ASCEND_RT_VISIBLE_DEVICES": "0,7"},
    {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "RATES": "none", "LOG_LEVEL": "DEBUG"},
    {
        "SOURCE": "modelscope",
        "HF_ENDPOINT": "https://mirror.example:8080/hf",
        "MODELSCOPE_DOMAIN": "www.mirror.example",
    },
]
BAD = [
    *((name, str(low - 1)) for name, (low, _) in BOUNDS.items()),
    *((name, str(high + 1)) for name, (_, high) in BOUNDS.items()),
    ("HCCL_CONNECT_TIMEOUT", "ten"),
    ("HCCL_CONNECT_TIMEOUT", "0x100"),
    ("HCCL_CONNECT_TIMEOUT", "99999999999999999999999"),
    ("ACLNN_CACHE_LIMIT", "1e4"),
    ("CPU_AFFINITY_CONF", "1,npu0"),
    ("CPU_AFFINITY_CONF", "1,force:2"),
    ("CPU_AFFINITY_CONF", "npu_affine:1"),
    ("CPU_AFFINITY_CONF", "mode:3"),
    ("CANN_VERSION", "9"),
    ("TORCH_NPU", "newest"),
    ("TOKENIZERS_PARALLELISM", "yes"),
    ("PYTORCH_NPU_ALLOC_CONF", "expandable_segment:True"),
    ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:true"),
    ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments=True"),
    ("HCCL_DETERMINISTIC", "maybe"),
    ("OMP_WAIT_POLICY", "PASSIVE"),
    ("LOG_LEVEL", "info"),
    ("HCCL_OP_EXPANSION_MODE", "CPU"),
    ("HCCL_IF_IP", "node1"),
    ("HCCL_BUFFSIZE", "0"),
    ("ASCEND_RT_VISIBLE_DEVICES", "0 1"),
    ("NPUS_PER_NODE", "0"),
    ("NODES", "0"),
    ("NODE_RANK", "1"),  # NODES is 1
    ("TORCH", "newest"),
    ("RATES", "measured"),
    ("DEVICE", "gpu"),
    ("SOURCE", "github"),
    ("HF_ENDPOINT", "mirror"),
    ("MODELSCOPE_DOMAIN", "a b"),
    ("HOSTS_DIR", "here"),
    ("CONFIG", "configs/none.yaml"),
    ("OUT", "~/out"),
    ("TRITON_CACHE_DIR", "~/cache"),
    ("TRITON_CACHE_DIR", "env.sh"),  # a file
]

TARGETS = """help install doctor accept download convert export data show finetune report preflight plan rehearse generate
    predict logprobs evaluate bench test test-versions test-browser test-trackers test-trl lint docs clean""".split()

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
env >env_of_child
if [[ $* == *--get* ]]; then if [[ $* =~ training.save=([^ ]+) ]]; then echo "${BASH_REMATCH[1]}"; else echo runs/tiny; fi; fi
if [[ $2 == qwen35.launch && $CONFIG == configs/*tiny.yaml ]]; then
    [[ -z ${HANGS:-} ]] || trap 'echo asked >>calls; exit 143' TERM
    mkdir -p runs/tiny
    touch runs/tiny/begun
    [[ -z ${IS_STOPPED:-} ]] || exit 143
    while [[ -n ${HANGS:-} ]]; do sleep 0.05; done
fi
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy that looks installed; each call of its python is a line in the file `calls`."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("Makefile", "env.sh"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in {
        "configs/tiny.yaml": "",
        "configs/lora/tiny.yaml": "",
        "configs/other.yaml": "",
        ".venv/bin/python": FAKE_PYTHON,
        ".venv/.installed": "cpu-x86-3.11.7\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    return tmp_path


@pytest.fixture
def run(project: Path) -> Run:
    def run(*command: str, cwd: Path = project, **variables: str) -> "subprocess.CompletedProcess[str]":
        clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        env = {**clean, "CANN_PATH": str(project / "no_cann"), "MASTER_PORT": str(free_port()), **variables}
        return subprocess.run(command, check=False, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

    return run


def calls(project: Path) -> list[str]:
    return (project / "calls").read_text().splitlines() if (project / "calls").exists() else []


def child(project: Path) -> dict[str, str]:
    lines = (project / "env_of_child").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


# -- the checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", GOOD, ids=lambda v: next(iter(v)))
def test_allowed_values_pass(run: Run, variables: dict[str, str]) -> None:
    result = run("bash", "scripts/finetune.sh", DRY_RUN="1", **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert "-m qwen35.launch " in result.stdout


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_wrong_value_stops_with_one_line(run: Run, project: Path, name: str, value: str) -> None:
    result = run("bash", "scripts/finetune.sh", **{name: value})
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert f"{name}={value}" in result.stderr
    assert not calls(project)


def test_the_line_says_what_is_allowed(run: Run) -> None:
    for name, value, allowed in (
        ("HCCL_CONNECT_TIMEOUT", "100", ("120", "7200")),
        ("HCCL_DETERMINISTIC", "1", ("true", "false", "strict")),
    ):
        [line] = run("bash", "scripts/finetune.sh", **{name: value}).stderr.splitlines()
        assert all(word in line for word in (f"{name}={value}", *allowed))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "MASTER_ADDR"),
        ({"NODE_RANK": "0"}, "MASTER_ADDR"),
        ({"MASTER_ADDR": "127.0.0.1"}, "NODE_RANK"),
        ({"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "2"}, "NODE_RANK=2"),
    ],
)
def test_several_nodes_need_a_master_and_a_rank(run: Run, variables: dict[str, str], named: str) -> None:
    result = run("make", "finetune", "NODES=2", **variables)
    assert result.returncode != 0
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert named in line


# -- the defaults ----------------------------------------------------------------------------------


def test_every_variable_is_documented() -> None:
    text = (ROOT / "env.sh").read_text()
    for name in SEED_TABLE + OTHERS:
        # a comment right above, or above the lines of its group
        assert re.search(rf'^# .*\n(: "\$.*\n)*: "\$\{{{name}:=', text, re.MULTILINE), name


def test_variables_set_outside_reach_the_training(run: Run, project: Path) -> None:
    result = run(
        "make", "finetune", "CONFIG=configs/other.yaml", "ARGS=training.train_iters=20 'model.freeze=[a, b]'",
        HCCL_CONNECT_TIMEOUT="300", TASK_QUEUE_ENABLE="0", NODE_ADDR="10.0.0.2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    got = child(project)
    assert got["HCCL_CONNECT_TIMEOUT"] == "300"
    assert got["TASK_QUEUE_ENABLE"] == "0"
    assert got["HCCL_IF_IP"] == "10.0.0.2"
    assert calls(project)[-1].startswith("-m qwen35.launch --nproc_per_node 2 ")
    assert calls(project)[-1].endswith(" configs/other.yaml training.train_iters=20 model.freeze=[a, b]")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--logprobs - configs/other.yaml"),
        (["OUT=o"], "--logprobs o configs/other.yaml"),
        (["DATA=d", "OUT=o"], "--logprobs o configs/other.yaml data.dataset_param.basic_parameters.dataset=d"),
    ],
)
def test_log_probabilities_are_computed_where_a_run_would_train(
    run: Run, project: Path, given: list[str], words: str
) -> None:
    assert run("make", "logprobs", "CONFIG=configs/other.yaml", *given).returncode == 0
    assert calls(project)[-1].startswith("-m qwen35.launch --nproc_per_node 2 ")
    assert calls(project)[-1].endswith(f" {words}")
    assert "OUT is not set" in run("make", "logprobs", "CONFIG=configs/other.yaml", "DATA=d").stderr
    assert "leave HOSTS out" in run("make", "logprobs", "CONFIG=configs/other.yaml", "HOSTS=env.sh").stderr


def test_a_run_that_make_started_knows_its_parent(run: Run, project: Path) -> None:
    """By the process that qwen35.launch is told of; a shell's end is no reason to stop."""
    assert run("make", "finetune", "CONFIG=configs/other.yaml").returncode == 0
    assert child(project)["QWEN35_PARENT"].isdecimal()
    assert run("bash", "scripts/finetune.sh", CONFIG="configs/other.yaml").returncode == 0
    assert "QWEN35_PARENT" not in child(project)


def test_an_open_quote_stops_the_launch(run: Run) -> None:
    result = run("bash", "scripts/finetune.sh", ARGS="training.lr=1 model.freeze=['a] training.seed=1", DRY_RUN="1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "ARGS=training.lr=1 model.freeze=['a] training.seed=1" in result.stderr


def test_defaults_reach_the_training_and_empty_variables_stay_unset(run: Run, project: Path) -> None:
    assert run("make", "finetune", "CONFIG=configs/other.yaml").returncode == 0
    got = child(project)
    assert got["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert got["TOKENIZERS_PARALLELISM"] == "false"
    assert got["HCCL_EXEC_TIMEOUT"] == "1800"
    assert got["TRITON_CACHE_DIR"] == f"/tmp/qwen35-triton-{os.getuid()}"
    assert got["MALLOC_MMAP_THRESHOLD_"] == "34359738368"
    assert got["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert not {"HCCL_BUFFSIZE", "HCCL_IF_IP", "ASCEND_RT_VISIBLE_DEVICES", "NPUS_PER_NODE"} & got.keys()


# -- CANN and the device ---------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "cann", "ascend-toolkit"])
def test_cann_is_sourced_where_it_is(run: Run, project: Path, below: str) -> None:
    folder = project / "Ascend" / below
    folder.mkdir(parents=True)
    (folder / "set_env.sh").write_text("false\nexport FROM_CANN=1$SURELY_UNBOUND\n")
    result = run("make", "finetune", "CONFIG=configs/other.yaml", CANN_PATH=str(project / "Ascend"))
    assert (result.returncode, result.stderr) == (0, "")
    assert child(project)["FROM_CANN"] == "1"


def test_a_cpu_run_hides_accelerators(run: Run, project: Path) -> None:
    assert run("make", "finetune", "CONFIG=configs/other.yaml", "DEVICE=cpu").returncode == 0
    assert child(project)["CUDA_VISIBLE_DEVICES"] == ""
    assert child(project)["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


def test_cann_is_needed_on_an_npu_alone(run: Run) -> None:
    result = run("make", "finetune", "CONFIG=configs/other.yaml")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    result = run("bash", "scripts/finetune.sh", DEVICE="npu")
    assert result.returncode == 2
    assert "CANN_PATH" in result.stderr


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, 2),
        ({"NPUS_PER_NODE": "3"}, 3),
        ({"DEVICE": "npu", "ASCEND_RT_VISIBLE_DEVICES": "0,1,4,5"}, 4),
        ({"DEVICE": "npu", "ASCEND_RT_VISIBLE_DEVICES": "0,1", "NPUS_PER_NODE": "1"}, 1),
    ],
)
def test_a_node_has_a_process_for_each_npu(run: Run, variables: dict[str, str], processes: int) -> None:
    result = run("bash", "scripts/finetune.sh", DRY_RUN="1", ASCEND_HOME_PATH="/usr", **variables)
    assert f"--nproc_per_node {processes} " in result.stdout
    assert ("OMP_NUM_THREADS" in result.stdout) == ("DEVICE" not in variables)


def test_more_processes_than_npus_are_refused(run: Run, project: Path) -> None:
    variables = {"DEVICE": "npu", "ASCEND_HOME_PATH": "/usr", "ASCEND_RT_VISIBLE_DEVICES": "0,1", "NPUS_PER_NODE": "3"}
    result = run("bash", "scripts/finetune.sh", **variables)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert all(word in result.stderr for word in ("NPUS_PER_NODE=3", "2 NPUs", "ASCEND_RT_VISIBLE_DEVICES=0,1"))
    assert not calls(project)


# -- the commands ----------------------------------------------------------------------------------


def test_nnodes_that_contradicts_nodes_is_refused(run: Run) -> None:
    result = run("make", "finetune", "NNODES=2", "DRY_RUN=1")
    assert result.returncode != 0
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert "NNODES=2" in line and " NODES=1" in line
    assert run("make", "finetune", "NNODES=1", "DRY_RUN=1").returncode == 0


def test_options_of_several_machines_reach_the_launcher(run: Run) -> None:
    variables = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7000", "NPUS_PER_NODE": "8"}
    result = run("make", "finetune", "DRY_RUN=1", *(f"{k}={v}" for k, v in variables.items()))
    assert "--nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr 10.0.0.1 --master_port 7000" in result.stdout


def test_preflight_is_the_launch_without_the_training(run: Run, project: Path) -> None:
    result = run(
        "make", "preflight", "ARGS=training.lr=1", NODES="2", NODE_RANK="0", MASTER_ADDR="a", RENDEZVOUS_TIMEOUT="9"
    )
    assert result.returncode == 0, result.stderr
    [call] = calls(project)  # of the tiny recipe too, which makes nothing first
    assert call.startswith("-m qwen35.launch --nnodes 2 --node_rank 0 ")
    assert call.endswith(" --rendezvous_timeout 9 --preflight configs/tiny.yaml training.lr=1")


def test_the_tiny_recipe_walks_from_model_to_score(run: Run, project: Path) -> None:
    result = run("make", "finetune", "ARGS=training.lr=1")
    assert result.returncode == 0, result.stderr
    tiny, convert, save, train, export, evaluate = calls(project)
    assert save == "-m qwen35.config.load configs/tiny.yaml training.lr=1 --get training.save"
    assert tiny == "-m qwen35.tools.tiny"
    assert convert == "-m qwen35.convert hf_to_dcp --hf_dir ckpt/hf_path/tiny --dcp_dir ckpt/mm_path/tiny"
    assert train.startswith("-m qwen35.launch --nproc_per_node 2 ") and train.endswith(
        " configs/tiny.yaml training.lr=1"
    )
    assert export.endswith("--dcp_dir runs/tiny --origin_hf_dir ckpt/hf_path/tiny --save_hf_dir runs/tiny/hf")
    assert evaluate.startswith(
        "-m qwen35.inference.evaluate --model runs/tiny/hf --data data/digits/heldout.json --recipe "
    )


def test_the_tiny_lora_recipe_walks_twice(run: Run, project: Path) -> None:
    """ARGS and OUT are those of the run with adapters, not of its base."""
    save = "training.save=runs/tiny_lora"
    result = run("make", "finetune", "CONFIG=configs/lora/tiny.yaml", f"ARGS={save}", OUT="out", HF="other")
    assert result.returncode == 0, result.stderr
    tiny, convert, _, *base, _, train, export, evaluate = calls(project)
    assert tiny == "-m qwen35.tools.tiny"
    assert convert == "-m qwen35.convert hf_to_dcp --hf_dir ckpt/hf_path/tiny --dcp_dir ckpt/mm_path/tiny"
    asked = "-m qwen35.inference.evaluate --model {} --data data/digits/heldout.json --recipe {}/config.yaml"
    assert " configs/tiny.yaml data.dataset_param.basic_parameters.dataset=data/digits/train_0-4.json " in base[0]
    assert "training.save=runs/tiny_base" in base[0]
    assert base[1].endswith(
        "--dcp_dir runs/tiny_base --origin_hf_dir ckpt/hf_path/tiny --save_hf_dir runs/tiny_base/hf"
    )
    assert base[2] == asked.format("runs/tiny_base/hf", "runs/tiny_base")
    assert train.endswith(f" configs/lora/tiny.yaml {save}")
    assert export.endswith("--save_hf_dir out") and "--dcp_dir runs/tiny_lora" in export
    assert evaluate == asked.format("out", "runs/tiny_lora")


@pytest.mark.parametrize("recipe", ["configs/tiny.yaml", "configs/lora/tiny.yaml"])
def test_on_other_machines_the_tiny_recipes_only_train(run: Run, project: Path, recipe: str) -> None:
    result = run("bash", "scripts/finetune.sh", CONFIG=recipe, NODES="2", NODE_RANK="1", MASTER_ADDR="a")
    assert result.returncode == 0, result.stderr
    asked, trained = calls(project)[::2], calls(project)[1::2]
    assert all("--get training.save" in call for call in asked)
    assert all(call.startswith("-m qwen35.launch --nnodes 2 --node_rank 1 ") for call in trained)
    assert len(trained) == (2 if "lora" in recipe else 1)


@pytest.mark.parametrize("recipe", ["configs/tiny.yaml", "configs/lora/tiny.yaml"])
def test_a_stopped_training_is_not_exported(run: Run, project: Path, recipe: str) -> None:
    result = run("bash", "scripts/finetune.sh", CONFIG=recipe, IS_STOPPED="1")
    assert result.returncode == 143, result.stderr
    assert calls(project)[-1].startswith("-m qwen35.launch")
    assert len([call for call in calls(project) if call.startswith("-m qwen35.launch")]) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_step_that_runs(project: Path, number: int, code: int) -> None:
    env = {"PATH": os.environ["PATH"], "CANN_PATH": "none", "HANGS": "1"}
    walk = subprocess.Popen(["bash", "scripts/finetune.sh"], cwd=project, env=env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (project / "runs/tiny/begun").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    walk.send_signal(number)
    _, err = walk.communicate(timeout=300)
    assert (walk.returncode, err) == (code, "")
    *_, train, asked = calls(project)
    assert train.startswith("-m qwen35.launch")
    assert asked == "asked"


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (
            ["convert", "HF=h", "DCP=d", 'TIE={"a b": "c"}'],
            '-m qwen35.convert hf_to_dcp --hf_dir h --dcp_dir d --tie_weight_mapping {"a b": "c"}',
        ),
        (["convert"], "-m qwen35.convert hf_to_dcp --hf_dir ckpt/hf_path/tiny --dcp_dir ckpt/mm_path/tiny"),
        (
            ["export", "DCP=d", "HF=h", "OUT=o"],
            "-m qwen35.convert dcp_to_hf --dcp_dir d --origin_hf_dir h --save_hf_dir o",
        ),
        (["convert", "HF=a/b/"], "-m qwen35.convert hf_to_dcp --hf_dir a/b/ --dcp_dir ckpt/mm_path/b"),
        (
            ["convert", "HF=a/b", "CONVERT_DCP=c"],
            "-m qwen35.convert hf_to_dcp --hf_dir a/b --dcp_dir c",
        ),
        (
            ["export"],
            "-m qwen35.convert dcp_to_hf --dcp_dir runs/tiny --origin_hf_dir ckpt/hf_path/tiny --save_hf_dir runs/tiny/hf",
        ),
        (
            ["export", "DCP=runs/mine/", "HF=h"],
            "-m qwen35.convert dcp_to_hf --dcp_dir runs/mine/ --origin_hf_dir h --save_hf_dir runs/mine/hf",
        ),
        (
            ["export", "DCP=runs/mine/iter_0000010", "HF=h"],
            "-m qwen35.convert dcp_to_hf --dcp_dir runs/mine/iter_0000010 --origin_hf_dir h --save_hf_dir runs/mine/hf",
        ),
        (
            ["export", "DCP=d", "HF=h", "EXPORT_OUT=o"],
            "-m qwen35.convert dcp_to_hf --dcp_dir d --origin_hf_dir h --save_hf_dir o",
        ),
        (["data", "LLAVA=l", "IMAGES=i", "OUT=o"], "-m qwen35.data convert --llava l --images i --out o"),
        (
            ["data", "LLAVA=l", "IMAGES=i", "OUT=o", "HF=h"],
            "-m qwen35.data convert --llava l --images i --out o --tokenizer h",
        ),
        (
            ["data"],
            (
                "-m qwen35.data convert --llava data/llava_instruct_150k.json --images data/COCO2017/train2017"
                " --out data/mllm_format_llava_instruct_data.json"
            ),
        ),
        (["data", "DATA=d", "HF=h"], "-m qwen35.data lengths --data d --tokenizer h"),
        (["show", "CONFIG=c", "ARGS=a.b=1"], "-m qwen35.data show c a.b=1"),
        (["show", "CONFIG=c", "ARGS=--lengths a.b=1"], "-m qwen35.data show c --lengths a.b=1"),
        (["download", "MODEL=a/b"], "-m qwen35.tools.download a/b --source hf"),
        (
            ["download", "MODEL=a/b", "SOURCE=modelscope", "OUT=o"],
            "-m qwen35.tools.download a/b --source modelscope --out o",
        ),
        (["evaluate", "MODEL=m", "DATA=d"], "-m qwen35.inference.evaluate --model m --data d"),
        (
            ["predict", "DATA=d", "OUT=o", "ARGS=--batch 2"],
            "-m qwen35.inference.predict --model runs/tiny/hf --data d --out o --batch 2",
        ),
        (
            ["predict", "MODEL=m", "HF=h", "OUT=o"],
            "-m qwen35.inference.predict --model m --hf h --data data/digits/heldout.json --out o",
        ),
        (
            ["generate", "IMAGE=a b.png, c.png", "PROMPT=-What 'is' $this?", "ARGS=--seed 1"],
            (
                "-m qwen35.inference.generate --model runs/tiny/hf --hf ckpt/hf_path/tiny --image a b.png c.png"
                " --prompt=-What 'is' $this? --seed 1"
            ),
        ),
        (
            ["generate", "MODEL=m", "HF=h", "VIDEO=a b.mp4; 1.png, 2.png;v", "PROMPT=x"],
            "-m qwen35.inference.generate --model m --hf h --video a b.mp4 --video 1.png 2.png --video v --prompt=x",
        ),
        (["generate", "MODEL=m", "HF=h"], "-m qwen35.inference.generate --model m --hf h"),
        (["bench", "ARGS=--only moe"], "-m bench --only moe"),
        (["accept", "ARGS=--only layers"], "-m accept --only layers"),
        (["test", "ARGS=-k 'a and b'"], "-m pytest -q -k a and b"),
        (["test", "ARGS=-m quick"], "-m pytest -q --numprocesses 3 --dist loadfile --no-loadscope-reorder -m quick"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_each_target_runs_its_program(run: Run, project: Path, command: list[str], call: str) -> None:
    result = run("make", *command)
    assert result.returncode == 0, result.stderr
    assert calls(project) == [call]


@pytest.mark.parametrize("given", [None, "active"])
@pytest.mark.parametrize("target", ["generate", "predict", "evaluate", "show"])
def test_the_threads_of_what_generates_sleep_while_they_wait(run: Run, project: Path, target: str, given: str) -> None:
    out = ["OUT=o"] if target == "predict" else []
    result = run("make", target, *out, *([f"OMP_WAIT_POLICY={given}"] if given else []))
    assert result.returncode == 0, result.stderr
    assert child(project).get("OMP_WAIT_POLICY") == (given or ("passive" if target != "show" else None))


@pytest.mark.parametrize(
    ("variables", "name", "checked", "chosen"),
    [
        ({}, "transformers-5.2.0", "transformers 5.2.0", "-m transformers and not peft "),
        ({"TORCH": "2.7.1"}, "torch-2.7.1", "torch 2.7.1", ""),
    ],
)
def test_other_versions_run_the_tests(
    run: Run, project: Path, variables: dict[str, str], name: str, checked: str, chosen: str
) -> None:
    made = project / "build/versions" / name
    (made / "bin").mkdir(parents=True)
    shutil.copy(project / ".venv/bin/python", made / "bin/python")
    (made / ".made").touch()
    result = run("make", "test-versions", "ARGS=-k digits", **variables)
    assert result.returncode == 0, result.stderr
    assert calls(project) == [f"- {checked}", f"-m pytest -q {chosen}-k digits"]
    assert not {"TORCH", "TRANSFORMERS", "MASTER_PORT"} & child(project).keys()


def test_another_version_than_asked_for_is_refused(run: Run, project: Path) -> None:
    made = project / "build/versions/transformers-5.2.1"
    (made / "bin").mkdir(parents=True)
    (made / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (made / "bin/python").chmod(0o755)
    (made / ".made").touch()
    result = run("make", "test-versions", TRANSFORMERS="5.2.1")
    assert result.returncode != 0
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert f"transformers {version('transformers')}" in line and "5.2.1" in line
    assert "passed" not in result.stdout


@pytest.mark.parametrize("model", ["runs/mine", "runs/mine/iter_0000010"])
def test_generate_takes_the_model_folder_of_a_run(run: Run, project: Path, model: str) -> None:
    (project / "runs/mine/iter_0000010").mkdir(parents=True)
    (project / "runs/mine/config.yaml").write_text("")
    assert run("make", "generate", f"MODEL={model}").returncode == 0
    assert run("make", "generate", f"MODEL={model}", "HF=h").returncode == 0
    assert calls(project) == [
        f"-m qwen35.inference.generate --model {model}",
        f"-m qwen35.inference.generate --model {model} --hf h",
    ]


def test_an_export_takes_the_model_folder_of_its_run(run: Run, project: Path) -> None:
    (project / "runs/mine/iter_0000010").mkdir(parents=True)
    (project / "runs/mine/config.yaml").write_text("")
    (project / ".venv/bin/python").write_text(FAKE_PYTHON.replace("echo runs/tiny", "echo ckpt/hf_path/own"))
    assert run("make", "export", "DCP=runs/mine/iter_0000010").returncode == 0
    asked, export = calls(project)
    assert asked == "-m qwen35.config.load runs/mine/config.yaml --get model.model_name_or_path"
    assert export.endswith("--origin_hf_dir ckpt/hf_path/own --save_hf_dir runs/mine/hf")


def test_a_failing_program_fails_the_target(run: Run, project: Path) -> None:
    (project / ".venv/bin/python").write_text("#!/usr/bin/env bash\nexit 3\n")
    for target in ("convert", "finetune", "test"):
        assert run("make", target).returncode != 0


@pytest.mark.parametrize("value", ["$(shell touch ran)", "$${x} $5 $$", "a#b 'c' \"d\" \\ e", "two\nlines"])
def test_what_is_given_to_make_arrives_letter_for_letter(run: Run, project: Path, value: str) -> None:
    assert run("make", "generate", "MODEL=m", f"PROMPT={value}").returncode == 0
    assert f"PROMPT={value}\n" in (project / "env_of_child").read_text()
    assert not (project / "ran").exists()


def test_make_alone_lists_the_commands_by_stage(run: Run, project: Path) -> None:
    result = run("make")
    assert (result.returncode, result.stderr) == (0, "")
    blocks = [block.splitlines() for block in result.stdout.strip().split("\n\n")]
    assert [stage for stage, *_ in blocks[:-1]] == "Set up,Weights,Data,Train,Use,Prove,Develop".split(",")
    commands = [line for _, *lines in blocks[:-1] for line in lines]
    assert {line.split()[1] for line in commands if line.startswith("  make ")} == {*TARGETS, "test-npu"}
    # what is followed by a value has env.sh's own, or says one that is found out
    defaults = dict(re.findall(r'^: "\$\{(\w+):=(.*)\}"$', (project / "env.sh").read_text(), re.MULTILINE))
    named = [line for line in commands if re.match(r" {21}(?!e\.g\.)", line)]
    variables = dict(
        re.findall(r"(?<![\w/])([A-Z_]{2,})(?:=([^\s,]+))?", re.sub('"[^"]*"|<[^>]*>', "", "\n".join(named)))
    )
    assert variables.keys() <= defaults.keys()
    assert not [
        n for n, value in variables.items() if value and defaults[n] not in ("", value) and "$" not in defaults[n]
    ]
    assert {"NODES": "", "SOURCE": "hf", "MASTER_PORT": "", "NPU_MEMORY_GB": "64"}.items() <= variables.items()
    examples = [line.partition("e.g. ")[2] for line in commands if "e.g. " in line]
    assert len(examples) == len(TARGETS) + 1 - len(blocks[-2][1:])  # all but those of the last stage
    assert {"ARGS=--help", "scripts/X.sh --help"} <= set(
        re.findall(r"ARGS=--help|scripts/X\.sh --help", "\n".join(blocks[-1]))
    )
    assert not calls(project)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("CONFIGS=configs/other.yaml", "CONFIG"),
        ("config=configs/other.yaml", "CONFIG"),
        ("NPU_PER_NODE=4", "NPUS_PER_NODE"),
        ("training.lr=1e-4", 'ARGS="training.lr='),
        ("O'UT=x", "OUT"),
    ],
)
def test_a_variable_that_no_command_reads_starts_nothing(run: Run, project: Path, given: str, nearest: str) -> None:
    for target in ("finetune", "help", "export"):
        result = run("make", target, given)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert f" {given.partition('=')[0]} " in result.stderr and f" {nearest}" in result.stderr
    assert not calls(project)


def test_a_variable_that_is_given_twice_starts_nothing(run: Run, project: Path) -> None:
    """Of two ARGS="…" make keeps the last, without a word."""
    result = run("make", "finetune", "ARGS=training.lr=1e-4", "NODES=1", "ARGS=training.seed=3")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "ARGS is given more than once, of which make keeps the last alone" in result.stderr
    assert not calls(project)
    text = "a\nARGS=b\nNODES=2"  # no other variables, but lines of one
    assert run("make", "generate", "MODEL=m", "ARGS=--greedy", f"PROMPT={text}").returncode == 0
    assert calls(project)


@pytest.mark.parametrize("line", ["ASCEND_RT_VISIBLE_DEVICES=4,5", "export CONFIG=configs/mine.yaml", "OWN=1"])
def test_a_plain_assignment_in_env_sh_starts_nothing(run: Run, project: Path, line: str) -> None:
    """It is not exported to what is started; where it is, it wins over what is given."""
    file, name = project / "env.sh", line.removeprefix("export ").partition("=")[0]
    kept = [row for row in file.read_text().splitlines() if line != "ASCEND_RT_VISIBLE_DEVICES=4,5" or name not in row]
    file.write_text("\n".join([*kept, line, ""]))
    result = run("make", "finetune", "CONFIG=configs/other.yaml")
    assert result.returncode == 2 and not calls(project)
    words = f"finetune.sh: env.sh, line {len(kept) + 1}: {line.removeprefix('export ')} would be lost, "
    assert words in result.stderr and f'write : "${{{name}:=' in result.stderr
    file.write_text(file.read_text().replace(line, "export OWN=1"))
    assert run("make", "finetune", "CONFIG=configs/other.yaml").returncode == 0
    assert child(project)["OWN"] == "1"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            ': "${HCCL_CONNECT_TIMEOUT:=7000}"',
            "HCCL_CONNECT_TIMEOUT stands above already, and what stands first counts",
        ),
        (": ${HCCL_ALGO:=ring}", 'HCCL_ALGO:=ring} would not be exported; write : "${NAME:=value}"'),
        (': "${HCCL_ALGO=ring}"', 'HCCL_ALGO=ring}" would not be exported'),
        ('  : "${HCCL_ALGO:=ring}"', 'HCCL_ALGO:=ring}" would not be exported'),
    ],
)
def test_a_line_of_env_sh_without_effect_starts_nothing(run: Run, project: Path, line: str, words: str) -> None:
    file = project / "env.sh"
    count, text = len(file.read_text().splitlines()), file.read_text()
    file.write_text(f"{text}{line}\n")
    result = run("make", "finetune", "CONFIG=configs/other.yaml")
    assert result.returncode == 2 and not calls(project)
    assert f"finetune.sh: env.sh, line {count + 1}: " in result.stderr and words in result.stderr, result.stderr
    file.write_text(f'{text}: "${{HCCL_ALGO:=ring}}" # of our own\n')
    assert run("make", "finetune", "CONFIG=configs/other.yaml").returncode == 0
    assert child(project)["HCCL_ALGO"] == "ring"


@pytest.mark.parametrize(
    ("command", "unread"),
    [
        ("finetune DATA=mine.json HF=ckpt/hf_path/mine", "finetune reads no HF, DATA"),
        ("finetune CONFIG=configs/other.yaml OUT=runs/new", "finetune reads no OUT"),
        ("evaluate MODEL=m CONFIG=configs/other.yaml", "evaluate reads no CONFIG"),
        ("evaluate MODEL=m HF=h", "evaluate reads no HF"),
        ("export MODEL=runs/mine", "export reads no MODEL"),
        ("export DRY_RUN=1", "export reads no DRY_RUN"),
        ("convert finetune MODEL=m", "convert finetune reads no MODEL"),
    ],
)
def test_what_another_command_reads_starts_nothing(run: Run, project: Path, command: str, unread: str) -> None:
    """It says on what to do something, and this command would do it on something else."""
    result = run("make", *command.split())
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"make {unread}:" in result.stderr
    assert not calls(project)


def test_several_commands_read_together_what_each_reads(run: Run, project: Path) -> None:
    result = run("make", "convert", "finetune", "HF=h", "CONFIG=configs/other.yaml", "NPUS_PER_NODE=1", "DEVICE=cpu")
    assert (result.returncode, result.stderr) == (0, "")
    assert [call.split()[1] for call in calls(project)] == ["qwen35.convert", "qwen35.launch"]


def test_variables_that_are_known_or_not_makes_own_are_let_through(run: Run, project: Path) -> None:
    given = ("MAKEFLAGS=-s", "SHELL=/bin/bash", "HF_TOKEN=secret", "NNODES=1", "OMP_NUM_THREADS=1")
    assert run("make", "-j2", "finetune", "CONFIG=configs/other.yaml", *given, CONFIGS="x").returncode == 0
    assert child(project)["HF_TOKEN"] == "secret"
    assert child(project)["CONFIGS"] == "x"


@pytest.mark.parametrize("target", ["install", "convert", "data", "bench", "generate"])
def test_variables_of_a_run_stop_no_other_command(run: Run, project: Path, target: str) -> None:
    """`make rehearse NODES=2` installs first, without a MASTER_ADDR."""
    result = run("make", target, "NODES=2", "NODE_RANK=7", DRY_RUN="1")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", ["finetune.sh", "doctor.sh", "preflight.sh", "rehearse.sh", "plan.sh"])
def test_help_in_args_starts_nothing(run: Run, project: Path, script: str) -> None:
    result = run("bash", f"scripts/{script}", ARGS="--help")
    assert (result.returncode, result.stderr) == (0, "")
    own = {"rehearse.sh": ["-m rehearse --help"], "plan.sh": ["-m rehearse.plan --help"]}
    assert calls(project) == own.get(script, [])
    assert script in own or "docs/settings.md" in result.stdout


def test_kernels_outside_of_the_environment_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "kernels"], cwd=ROOT, env={}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "source .venv/bin/activate" in done.stderr


def test_a_choice_without_a_test_says_so() -> None:
    words = ["-k", "no_such_name", "tests/house/test_docker.py"]
    done = subprocess.run(
        ["bash", "scripts/test.sh", *words], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert [line for line in done.stdout.splitlines() if "no test matches" in line and "-k no_such_name" in line]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_helps_from_any_folder(run: Run, project: Path, script: str) -> None:
    result = run("bash", str(project / "scripts" / script), "--help", cwd=Path("/"))
    assert (result.returncode, result.stderr) == (0, "")
    assert script.removesuffix(".sh") in result.stdout.lower()
    assert str(project) in result.stdout
    assert "SBATCH" not in result.stdout  # the head alone
    assert not calls(project)


def test_scripts_run_from_any_folder(run: Run, project: Path) -> None:
    result = run("bash", str(project / "scripts/convert.sh"), cwd=Path("/"))
    assert result.returncode == 0, result.stderr
    assert len(calls(project)) == 1


def test_nothing_runs_before_an_install(run: Run, project: Path) -> None:
    (project / ".venv/.installed").unlink()
    result = run("bash", "scripts/convert.sh")
    assert result.returncode == 2
    assert "make install" in result.stderr
