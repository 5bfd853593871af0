"""Which node a launcher is, and which rank a task, by what the schedulers of clusters set."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from forked import PATHS, Forked, launched
from plain import plain
from ports import free_port

from qwen35.config.load import SettingError
from qwen35.launch.cluster import Place
from qwen35.launch.cluster import find_place as find_node
from qwen35.rank import find_place as find_rank

ROOT = Path(__file__).parents[2]
MASTER = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
SLURM = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_NNODES": "2"}

# Each row of the table of clusters: what is set on the second of two nodes with eight NPUs.
ROWS = {
    "Kubeflow PyTorchJob": (
        {**MASTER, "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8", "RANK": "1", "WORLD_SIZE": "16"},
        ("PET_NNODES and PET_NODE_RANK", "job-master-0", 23456, 8),
    ),
    "its elasticPolicy without a master": (
        {"PET_NNODES": "2:2", "PET_RDZV_ENDPOINT": "job-worker-0:29400", "HOSTNAME": "job-worker-1"},
        ("PET_NNODES and HOSTNAME", "job-worker-0", 29400, None),
    ),
    "Kubeflow Trainer v2": (
        {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": "job-node-0-0.job",
         "PET_MASTER_PORT": "29500"},
        ("PET_NNODES and PET_NODE_RANK", "job-node-0-0.job", 29500, None),
    ),
    "Volcano, older Kubeflow, PAI DLC": (
        {**MASTER, "RANK": "1", "WORLD_SIZE": "2"},
        ("RANK and WORLD_SIZE of pods", "job-master-0", 23456, None),
    ),
    "MindCluster acjob of PyTorch": (
        {**MASTER, "RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0,1,2,3,4,5,6,7",
         "MINDX_TASK_ID": "x"},
        ("RANK and WORLD_SIZE of MindCluster", "job-master-0", 23456, 8),
    ),
    "MindCluster acjob of MindSpore": (
        {"MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "2222", "MS_NODE_RANK": "1", "MS_WORKER_NUM": "16",
         "MS_LOCAL_WORKER": "8", "MINDX_TASK_ID": "x"},
        ("MS_WORKER_NUM and MS_NODE_RANK", "10.0.0.1", 2222, 8),
    ),
    "ModelArts": (
        {"MA_NUM_HOSTS": "2", "VC_TASK_INDEX": "1", "VC_WORKER_HOSTS": "worker-0.x,worker-1.x", "MA_NUM_GPUS": "8"},
        ("MA_NUM_HOSTS and VC_TASK_INDEX", "worker-0.x", None, 8),
    ),
    "Slurm": (
        {**SLURM, "SLURM_NODEID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
        ("SLURM_NNODES and SLURM_NODEID", "gpu03", None, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("environment", "place"), ROWS.values(), ids=ROWS)
def test_each_scheduler_gives_a_node_its_place(environment, place):
    source, *others = place
    assert find_node(environment) == Place(source, 2, 1, *others)


def test_who_says_that_the_node_is_alone_is_believed():
    for environment, _ in ROWS.values():
        assert find_node(environment, 1) is None
    with pytest.raises(SettingError, match="this process is a rank already"):
        find_node({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, 1)


def test_without_a_scheduler_a_node_is_alone():
    assert find_node({"PATH": "/bin", "MASTER_ADDR": "x", "WORLD_SIZE": ""}) is None
    shell_of_salloc = {**SLURM, "SLURM_NTASKS": "16"}
    assert find_node(shell_of_salloc) is None
    batch_script = {"SLURM_NNODES": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert find_node(batch_script) is None
    assert find_node({"MA_NUM_HOSTS": "1", "MA_NUM_GPUS": "8"}).nnodes == 1


@pytest.mark.parametrize("more", [ROWS["ModelArts"][0], {}])
def test_of_the_processes_that_modelarts_starts_for_its_cards_one_starts_the_ranks(more):
    table = {"RANK_TABLE_FILE": "/x.json", "RANK_ID": "0", "RANK_SIZE": "8"}
    assert find_node({**table, **more, "ASCEND_DEVICE_ID": "0"}).is_starter
    assert not find_node({**table, **more, "RANK_ID": "3", "ASCEND_DEVICE_ID": "3"}).is_starter


PET = ROWS["Kubeflow PyTorchJob"][0]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, "RANK=3 LOCAL_RANK=3: this process is a rank already"),
        ({**PET, "PET_NNODES": "1:4"}, "PET_NNODES=1:4: the number of nodes of a run is fixed"),
        ({**PET, "WORLD_SIZE": "24"}, "WORLD_SIZE=24, but PET_NNODES=2 and PET_NPROC_PER_NODE=8"),
        ({**PET, "RANK": "0"}, "RANK=0, but PET_NNODES and PET_NODE_RANK give node 1"),
        ({"PET_NNODES": "2", "HOSTNAME": "here"}, "PET_NODE_RANK=here: must be a whole number"),
        ({**MASTER, "RANK": "2", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE of pods give node 2 of 2"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "give 2 nodes, and not where node 0 is: set MASTER_ADDR"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one: must be a whole number from 0"),
        (
            {**ROWS["MindCluster acjob of PyTorch"][0], "WORLD_SIZE": "15"},
            "WORLD_SIZE=15 is no multiple of LOCAL_WORLD_S",
        ),
        ({**ROWS["ModelArts"][0], "MA_NUM_HOSTS": "3"}, "MA_NUM_HOSTS=3, but VC_WORKER_HOSTS=worker-0.x,worker-1.x"),
        (
            {**ROWS["Slurm"][0], "SLURM_NTASKS": "16"},
            "SLURM_NTASKS=16 on SLURM_NNODES=2: a launcher is one task a node",
        ),
        (
            {"RANK_TABLE_FILE": "x", "RANK_ID": "8", "RANK_SIZE": "16", "ASCEND_DEVICE_ID": "0"},
            "RANK_ID=8: not the first",
        ),
    ],
)
def test_contradictions_are_refused(environment, words):
    with pytest.raises(SettingError) as caught:
        find_node(environment)
    assert words in str(caught.value)


# -- tasks of srun ---------------------------------------------------------------------------------


def test_a_task_of_srun_is_a_rank():
    environment = {**SLURM, "SLURM_STEP_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    line = find_rank(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environment[name] for name in names] == ["3", "4", "1", "2", "gpu03", "20528"]
    assert line == "rank 3 of 4 by SLURM_PROCID and SLURM_NTASKS, 2 a node, store at gpu03:20528"
    assert find_rank(environment) is None  # it is one now


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu7", "gpu7"), ("gpu7,gpu9", "gpu7"), ("a-b[003,007-9]", "a-b003"), ("x[1-2],y[3]", "x1"), ("n[1-2]-ib", None)],
)
def test_the_first_node_of_a_list_is_found(nodes, first):
    environment = {"SLURM_JOB_NODELIST": nodes, "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    environment["SLURM_LOCALID"] = "0"
    if first:
        find_rank(environment)
        assert environment["MASTER_ADDR"] == first
    else:
        with pytest.raises(SettingError, match="names no first node that is understood; set MASTER_ADDR"):
            find_rank(environment)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 WORLD_SIZE=2 LOCAL_RANK=: these number pods, not processes"),
        ({"RANK": "1", "WORLD_SIZE": "16", "LOCAL_RANK": "0,1"}, "LOCAL_RANK=0,1: these number pods"),
        ({**SLURM, "SLURM_NTASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "SLURM_NTASKS=3 on SLURM_NNODES=2"),
    ],
)
def test_variables_of_no_rank_are_refused(environment, words):
    with pytest.raises(SettingError) as caught:
        find_rank(environment)
    assert words in str(caught.value)


def test_a_process_without_variables_is_alone():
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1"}, {**SLURM, "SLURM_NTASKS": "2"}, {"SLURM_PROCID": "0"}):
        before = dict(environment)
        assert find_rank(environment) is None and environment == before


# -- real launchers --------------------------------------------------------------------------------


FEW_STEPS = ("training.train_iters=2", "training.log_interval=1", "data.dataloader_param.num_workers=0")


def start(workplace: Path, save: Path, environment: Mapping[str, str], *command: str, **kwargs) -> subprocess.Popen:
    own = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    return subprocess.Popen(
        [*command, str(workplace / "recipe.yaml"), f"training.save={save}", *FEW_STEPS],
        cwd=ROOT,
        env=own | {"OMP_NUM_THREADS": "1", "NODE_ADDR": "127.0.0.1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


LAUNCH = (sys.executable, "-m", "qwen35.launch")


def test_the_launcher_of_a_scheduler_that_contradicts_its_options_starts_nothing(workplace, tmp_path):
    for options, words in (
        (("--nnodes", "3"), "NODES=3, but RANK and WORLD_SIZE of pods give 2 nodes: leave NODES out"),
        (
            ("--nproc_per_node", "2"),
            "PET_NODE_RANK come with 8 processes a node, and 2 would be started here: set NPUS_PER",
        ),
    ):
        environment = PET if "--nproc_per_node" in options else ROWS["Volcano, older Kubeflow, PAI DLC"][0]
        process = start(workplace, tmp_path / "run", environment, *LAUNCH, *options)
        out, err = process.communicate(timeout=300)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (process.returncode, out, len(errors)) == (1, "", 1) and words in errors[0]
    table = {"RANK_TABLE_FILE": "x", "RANK_ID": "3", "RANK_SIZE": "8", "ASCEND_DEVICE_ID": "3"}
    process = start(workplace, tmp_path / "run", table, *LAUNCH)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, "")
    assert plain(err).endswith("ASCEND_DEVICE_ID=3: the process of device 0 starts all ranks\n")


def test_tasks_of_srun_train_one_run(workplace, tmp_path):
    """Two tasks on one node, without a launcher of ours."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here"}
    command = [
        sys.executable,
        "-m",
        "qwen35.train",
        str(workplace / "recipe.yaml"),
        f"training.save={tmp_path / 'run'}",
    ]
    tasks = [
        Forked(launched, [*command, *FEW_STEPS], {**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
        for i in range(2)
    ]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in tasks]
    assert [code for *_, code in ends] == [0, 0], ends
    out = plain(ends[0][0])
    assert out.startswith("rank 0 of 2 by SLURM_PROCID and SLURM_NTASKS, 2 a node, store at 127.0.0.1:")
    assert "2 processes on" in out and ends[1][0] == ""


PODS = """
node() { RANK=$1 NODE_ADDR=$2 "${@:3}" >"out$1" 2>"err$1"; }
export -f node
if [[ $0 == apart ]]; then # a network of its own for each, with a cable between them
    unshare --net sleep 600 & other=$!
    until [[ $(readlink /proc/$other/ns/net) != "$(readlink /proc/self/ns/net)" ]]; do sleep 0.05; done
    ip link set lo up
    ip link add cable0 type veth peer name cable1 netns "$other"
    ip addr add 10.77.0.1/24 dev cable0
    ip link set cable0 up
    there=(nsenter --target "$other" --net)
    "${there[@]}" bash -ec 'ip link set lo up; ip addr add 10.77.0.2/24 dev cable1; ip link set cable1 up'
    export MASTER_ADDR=10.77.0.1
    "${there[@]}" bash -c 'node 1 10.77.0.2 "$@"' bash "$@" & second=$!
    node 0 10.77.0.1 "$@"
else
    node 1 127.0.0.1 "$@" & second=$!
    node 0 127.0.0.1 "$@"
fi
wait $second
[[ -z ${other:-} ]] || kill $other
"""


def test_two_pods_with_a_network_each_train_one_run(workplace, tmp_path):
    """On a machine that allows it; else they share one."""
    pod = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    recipe = [str(workplace / "recipe.yaml"), f"training.save={tmp_path / 'run'}", "training.train_iters=2"]
    probe = ["unshare", "-rn", "ip", "link", "add", "a", "type", "veth", "peer", "name", "b"]
    is_apart = not subprocess.run(probe, capture_output=True, check=False).returncode
    shell = [*["unshare", "-rn"] * is_apart, "bash", "-ec", PODS, "apart" if is_apart else "together"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS} | pod
    done = subprocess.run(
        [*shell, *LAUNCH, *recipe],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    errors = [(tmp_path / f"err{rank}").read_text() for rank in range(2)]
    assert done.returncode == 0, (done.stderr, errors)
    for rank, err in enumerate(errors):
        assert f"RANK and WORLD_SIZE of pods say: node {rank} of 2" in err
    assert "all-reduce over 2 ranks of 2 nodes" in (tmp_path / "out0").read_text()
    assert (tmp_path / "run/iter_0000002").is_dir()
