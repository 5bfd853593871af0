"""HOSTS and Slurm: the real scripts in a copy of the project, with stand-ins for ssh and srun."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
from plain import plain

from qwen35.config.load import SettingError
from qwen35.launch.hosts import Host, check_environment, read_hosts

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" ---- >"$0.$$.log"
while [[ $1 == -* ]]; do case $1 in -o | -p) shift 2 ;; *) shift ;; esac; done
[[ $1 != unreachable ]] || { echo "ssh: connect to host $1 port 22: Connection refused" >&2; exit 255; }
env -i PATH="$PATH" bash -c "$2" # a child, which outlives this process as on another machine
"""
PYTHON = """#!/usr/bin/env bash
source ./act
"""
DRIVER = """
import sys, qwen35.launch.hosts as h, qwen35.launch.job
h.SHUTDOWN_GRACE, h.SAVE_GRACE, qwen35.launch.job.DUPLICATE_SIGNAL = 0.3, 0.6, 0.0
h.outlive_readers()
sys.exit(h.main(sys.argv[1:]))
"""


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The project's folder on the nodes. What `python` does there is in the file `act`."""
    shutil.copytree(ROOT / "scripts", tmp_path / "it's there/scripts")
    folder = tmp_path / "it's there"
    files = {"configs/other.yaml": "", ".venv/.installed": "cpu", ".venv/bin/python": PYTHON, "act": ""}
    for name, text in {**files, "env.sh": (ROOT / "env.sh").read_text()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / ".venv/bin/python").chmod(0o755)
    (tmp_path / "ssh").write_text(STAND_IN)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("# two\nme@one slots=1 addr=127.0.0.1 port=2222\n\ntwo slots=1\n")
    return folder


def start(there: Path, *overrides: str, hosts: str = "hosts", **variables: str) -> subprocess.Popen:
    names = (
        "CONFIG NODES MASTER_PORT NPUS_PER_NODE RENDEZVOUS_TIMEOUT CANN_PATH HCCL_CONNECT_TIMEOUT OUT HOSTS SSH ARGS"
    )
    env = {"PATH": os.environ["PATH"], "SSH": str(there.parent / "ssh"), "HOSTS_DIR": str(there), "NODES": "1"}
    env |= {"CONFIG": "configs/other.yaml", "CANN_PATH": str(there / "none"), **variables}
    overrides = (*overrides, "training.train_iters=2")
    command = ["--variables", names, "--", str(there.parent / hosts), "configs/tiny.yaml", *overrides]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ssh_log(there: Path) -> str:
    """The arguments of each call; each call writes a file of its own."""
    return "".join(path.read_text() for path in there.parent.glob("ssh.*.log"))


def pids(process: subprocess.Popen, count: int = 2) -> dict[str, int]:
    """Name of a node -> the process that prints its id there."""
    lines = [process.stdout.readline().split() for _ in range(count)]
    return {name.rstrip(":"): int(pid) for name, pid in lines}


STAYS = """
trap 'echo asked >>asked_$NODE_RANK; echo saved; exit 143' TERM
echo $$
while :; do sleep 0.05; done
"""


def wait_until_gone(numbers: Iterable[int]) -> None:
    end = time.monotonic() + 300
    while any(Path(f"/proc/{number}").exists() for number in numbers):
        assert time.monotonic() < end
        time.sleep(0.02)


def asked(there: Path) -> list[str]:
    return sorted(path.name for path in there.glob("asked_*"))


def test_each_node_gets_its_rank_and_the_same_settings(there: Path) -> None:
    (there / "act").write_text(
        'env >env_$NODE_RANK; printf "%s\\n" "$@" >call_$NODE_RANK; echo "here is $NODE_RANK"; echo oh >&2'
    )
    odd = """a 'b' "c" $HOME `x` \\ \n ü"""
    process = start(
        there,
        "model.freeze=[a, 'b c', \"$HOME\"]",
        OUT=odd,
        HCCL_ALGO="level0:ring",
        HF_TOKEN="hf_secret",
        WANDB_MODE="offline",
        MLFLOW_TRACKING_URI="http://here",
        SWANLAB_EXP_NAME="mine",
        NPUS_PER_NODE="1",
    )
    out, err = process.communicate(timeout=300)
    assert (process.returncode, sorted(err.splitlines())) == (0, ["one: oh", "two: oh"]), err
    assert sorted(out.splitlines()) == ["one: here is 0", "two: here is 1"]
    for rank in range(2):
        text = (there / f"env_{rank}").read_text()
        assert f"OUT={odd}\n" in text and "HCCL_ALGO=level0:ring\n" in text and "HF_TOKEN" not in text
        sent = {name for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "SWANLAB_EXP_NAME") if f"\n{name}=" in text}
        assert len(sent) == (3 if rank == 0 else 0)  # node 0 has the rank that reports
        values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        assert {name: values[name] for name in ("NODES", "NODE_RANK", "MASTER_ADDR", "NPUS_PER_NODE")} == {
            "NODES": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "NPUS_PER_NODE": "1",
        }
        assert values.get("NODE_ADDR") == values.get("HCCL_IF_IP") == (None if rank else "127.0.0.1")
        call = (there / f"call_{rank}").read_text()
        assert f"qwen35.launch\n--nnodes\n2\n--node_rank\n{rank}\n" in call
        assert call.endswith("configs/other.yaml\nmodel.freeze=[a, 'b c', \"$HOME\"]\ntraining.train_iters=2\n")
    log = ssh_log(there)
    assert log.count("BatchMode=yes") == log.count("StrictHostKeyChecking=yes") == 2
    assert "-p\n2222\nme@one\n" in log and "\ntwo\ncd " in log
    assert not re.search(r"secret|level0|train_iters|OUT", log)  # others can read the list of processes


def test_a_node_that_fails_ends_the_others(there: Path) -> None:
    fails = (
        "if ((NODE_RANK == 1)); then until [[ -e up ]]; do sleep 0.05; done; echo 'error: a.json: bad' >&2; exit 7; fi"
    )
    hangs = "trap '' TERM; echo $$; touch up; while :; do sleep 0.05; done"
    (there / "act").write_text(f"{fails}\n{hangs}")
    process = start(there)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 7
    assert sorted(err.splitlines()) == ["error: two ended with exit code 7", "two: error: a.json: bad"]
    wait_until_gone([int(out.split()[1])])


def test_a_node_that_cannot_be_reached_is_named(there: Path) -> None:
    (there / "act").write_text(STAYS)
    (there.parent / "hosts").write_text("one addr=127.0.0.1\nunreachable\n")
    process = start(there)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.splitlines() == [
        "unreachable: ssh: connect to host unreachable port 22: Connection refused",
        "error: unreachable cannot be reached, or lost its connection; this must work without a prompt: ssh unreachable true",
    ]
    # the other was asked to save and stop, unless it had not begun yet
    assert asked(there) in ([], ["asked_0"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_makes_all_nodes_save(there: Path, number: int, code: int) -> None:
    (there / "act").write_text(STAYS)
    process = start(there)
    pids(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, sorted(out.splitlines())) == (code, ["one: saved", "two: saved"])
    assert plain(err).startswith("stopping: the run saves at the next log step, on all nodes") and err.count("\n") == 1
    assert asked(there) == ["asked_0", "asked_1"]


def test_a_node_cannot_forge_lines_of_another(there: Path) -> None:
    """Nor send control characters to the terminal."""
    (there / "act").write_text(r"printf 'a\rtwo: forged\033[2J\tü\n'")
    out, _ = start(there).communicate(timeout=300)
    assert sorted(out.splitlines()) == [rf"{name}: a\x0dtwo: forged\x1b[2J ü" for name in ("one", "two")]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_process_behind_ssh_does_not_kill_the_run(there: Path, number: int) -> None:
    """As from a lost connection or a session that ends: SIGTERM makes the node save and stop."""
    (there / "act").write_text(STAYS)
    process = start(there)
    pids(process)
    nodes = [node for ssh in psutil.Process(process.pid).children() for node in ssh.children()]
    assert [node.cmdline() for node in nodes] == [["bash", "scripts/node.sh"]] * 2
    for node in nodes:
        node.send_signal(number)
    if number == signal.SIGHUP:
        time.sleep(0.3)
        assert not asked(there)
        process.terminate()
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, sorted(out.splitlines())) == (143, ["one: saved", "two: saved"])


def test_a_stop_saves_without_a_reader(there: Path) -> None:
    """Ctrl-C also ends the reader of both streams, before anything is printed."""
    (there / "act").write_text(STAYS.replace("echo saved", "touch saved_$NODE_RANK; echo saved"))
    process = start(there)
    pids(process)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert len(list(there.glob("saved_*"))) == 2


def test_the_secret_is_sent_by_standard_input_only(there: Path) -> None:
    """New for each run unless it is set; never in a list of processes, nor printed."""
    (there / "act").write_text("env >env_$NODE_RANK; cat /proc/$$/cmdline >call_$NODE_RANK")
    found = []
    for variables in ({}, {}, {"RENDEZVOUS_SECRET": "that of the user"}):
        process = start(there, **variables)
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (0, "", "")
        both = [
            re.search(r"^RENDEZVOUS_SECRET=(.*)", (there / f"env_{n}").read_text(), re.MULTILINE)[1] for n in (0, 1)
        ]
        assert both[0] == both[1]
        found.append(both[0])
        seen = ssh_log(there) + "".join((there / f"call_{n}").read_text() for n in (0, 1))
        assert both[0] not in seen
    assert len(set(found)) == 3 and found[2] == "that of the user" and all(len(secret) == 64 for secret in found[:2])
    out, err = start(there, RENDEZVOUS_SECRET="that of the user", DRY_RUN="1").communicate(timeout=300)
    assert "NODE_RANK=1" in out and "that of the user" not in out + err
    process = start(there, RENDEZVOUS_SECRET="short")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "RENDEZVOUS_SECRET has fewer than 16 characters" in err


def test_a_second_ctrl_c_stops_at_once(there: Path) -> None:
    (there / "act").write_text("trap '' TERM; echo $$; while :; do sleep 0.05; done")
    process = start(there)
    started = pids(process)
    process.send_signal(signal.SIGINT)
    assert plain(process.stderr.readline()).startswith("stopping")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130
    wait_until_gone(started.values())


def test_kill_9_of_the_starter_makes_all_nodes_save(there: Path) -> None:
    """Though nobody reads their output any more."""
    (there / "act").write_text(
        STAYS.replace("echo saved", "for i in {1..3000}; do echo saved; done; touch done_$NODE_RANK")
    )
    process = start(there)
    started = pids(process)
    process.kill()
    process.stdout.close()
    process.wait()
    wait_until_gone(started.values())
    assert asked(there) == ["asked_0", "asked_1"]
    assert len(list(there.glob("done_*"))) == 2


def test_a_node_whose_env_sh_names_hosts_starts_only_itself(there: Path) -> None:
    env_sh = (there / "env.sh").read_text()
    (there / "env.sh").write_text(env_sh.replace('"${HOSTS:=}"', '"${HOSTS:=hosts}"'))
    (there / "act").write_text('echo "$2"')
    out, err = start(there).communicate(timeout=300)
    assert (sorted(out.splitlines()), err) == (["one: qwen35.launch", "two: qwen35.launch"], "")


def test_a_wrong_setting_starts_nothing(there: Path) -> None:
    process = start(there, "training.learning_rate=1")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert "training.learning_rate is no setting; it is training.lr here" in err
    assert not ssh_log(there)


def test_a_dry_run_prints_what_each_node_would_get(there: Path) -> None:
    process = start(there, DRY_RUN="1")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err, out.count("\n")) == (0, "", 2)
    assert "NODE_RANK=1" in out.splitlines()[1] and out.splitlines()[1].endswith(" training.train_iters=2")
    assert not ssh_log(there)


@pytest.mark.parametrize("preflight", [False, True])
def test_the_scripts_pass_their_arguments_on(there: Path, preflight: bool) -> None:
    (there / "act").write_text('printf "%s\\n" "$@"')
    env = {
        "PATH": os.environ["PATH"],
        "CANN_PATH": "none",
        "HOSTS": "hosts",
        "CONFIG": "configs/other.yaml",
        "NODES": "2",
    }
    script = "preflight.sh" if preflight else "finetune.sh"
    command = ["bash", str(there / "scripts" / script), "a.b=c d"]
    done = subprocess.run(
        command, env=env | {"ARGS": "x.y=1"}, capture_output=True, text=True, timeout=300, check=False
    )
    words = done.stdout.splitlines()
    assert (done.returncode, words[:2]) == (0, ["-m", "qwen35.launch.hosts"]), done.stderr
    assert ("--preflight" in words) == preflight
    assert words[-5:] == ["--", "hosts", "configs/other.yaml", "x.y=1", "a.b=c d"]
    assert {"HCCL_CONNECT_TIMEOUT", "RENDEZVOUS_TIMEOUT"} <= set(words[words.index("--variables") + 1].split())


# -- the file --------------------------------------------------------------------------------------


def test_a_hosts_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\nroot@10.0.0.2 addr=192.168.0.2 port=2200 # the second\n  # none\nfe80::3\n")
    assert read_hosts(tmp_path / "hosts") == [
        Host("a"),
        Host("root@10.0.0.2", address="192.168.0.2", port=2200),
        Host("fe80::3"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no node"),
        ("a\n-oProxyCommand=x", "line 2: '-oProxyCommand=x' is not a host name"),
        ("me@-x", "line 1: 'me@-x' is not a host name"),
        ("a;reboot", "line 1: 'a;reboot' is not a host name"),
        ("a\nb slots=0", "line 2: 'slots=0' needs a number"),
        ("a port=65536", "line 1: 'port=65536' needs a number"),
        ("a gpus=8", "line 1: 'gpus=8' is none of slots=…, addr=…, port=…"),
        ("a slots=1 slots=1", "'slots=1' is none of"),
        ("a addr=$(x)", "needs an address"),
        ("a\n\nme@a", "line 3: a is listed twice"),
        ("a slots=8\nb slots=4\nc", "all nodes must have the same slots: a 8, b 4, c no slots"),
    ],
)
def test_an_error_in_the_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(SettingError, match=re.escape(words)):
        read_hosts(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NODES": "3"}, "NODES=3, but HOSTS lists 2 nodes"),
        ({"NODE_RANK": "0"}, "NODE_RANK=0 belongs to one node"),
        ({"NODE_ADDR": "10.0.0.1"}, "NODE_ADDR=10.0.0.1 belongs to one node"),
        ({"HCCL_IF_IP": "10.0.0.1"}, "HCCL_IF_IP=10.0.0.1 belongs to one node"),
        ({"NPUS_PER_NODE": "4"}, "NPUS_PER_NODE=4, but HOSTS says slots=8"),
        ({"MASTER_ADDR": "b"}, "MASTER_ADDR=b, but HOSTS gives node 0 addr=a"),
    ],
)
def test_variables_that_contradict_the_file_are_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=re.escape(words)):
        check_environment([Host("one", 8, "a"), Host("two", 8)], environment)
    with pytest.raises(SettingError, match="cannot reach node 0 as localhost"):
        check_environment([Host("localhost"), Host("two")], {})
    check_environment([Host("one"), Host("two")], {"NODES": "2", "NPUS_PER_NODE": "4", "MASTER_ADDR": "b"})


# -- Slurm -----------------------------------------------------------------------------------------

SRUN = """#!/usr/bin/env bash
# each task of the step here; SIGTERM goes to all of them, as srun forwards it
while [[ $1 == -* ]]; do shift; done
trap 'kill -TERM "${tasks[@]}"' TERM
for n in 0 1; do
    SLURM_NODEID=$n "$@" &
    tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
    while :; do
        last=0
        wait "$task" || last=$?
        kill -0 "$task" 2>/dev/null || break
    done
    ((last <= code)) || code=$last
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'gpu3\\ngpu4\\n'; else echo "$@" >>scontrol.log; fi
"""


def slurm(there: Path, *arguments: str, script: str = "../bin/spool", **variables: str) -> subprocess.Popen:
    folder = there.parent / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "spool": (there / "scripts/slurm.sh").read_text()}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "CANN_PATH": "none", "CONFIG": "configs/other.yaml"}
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_SUBMIT_DIR": str(there)}
    return subprocess.Popen(
        ["bash", str(there / script), *arguments],
        env=env | job | variables,
        cwd=there,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_slurm_job_gives_each_node_its_rank(there: Path) -> None:
    (there / "act").write_text('printf "%s " "$@" >call_$NODE_RANK; echo "$RENDEZVOUS_SECRET" >secret_$NODE_RANK')
    process = slurm(there, "training.train_iters=2", "model.freeze=[a, b]")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "", "")
    for rank in range(2):
        call = (there / f"call_{rank}").read_text()
        assert f"--nnodes 2 --node_rank {rank} " in call and "--master_addr gpu3 " in call
        assert call.endswith("configs/other.yaml training.train_iters=2 model.freeze=[a, b] ")
    first, second = ((there / f"secret_{rank}").read_text() for rank in range(2))
    assert first == second and re.fullmatch(r"[0-9a-f]{64}\n", first)
    assert not (there / "scontrol.log").exists()


def test_a_slurm_job_near_its_limit_saves_and_requeues(there: Path) -> None:
    (there / "act").write_text(STAYS)
    process = slurm(there)
    for _ in range(2):
        process.stdout.readline()
    process.terminate()
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (143, "saved\nsaved\n")
    assert (there / "scontrol.log").read_text() == "requeue 17\n"


def test_a_slurm_job_that_finishes_as_it_is_asked_to_stop_is_not_requeued(there: Path) -> None:
    (there / "act").write_text(STAYS.replace("exit 143", "exit 0"))
    process = slurm(there)
    for _ in range(2):
        process.stdout.readline()
    process.terminate()
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, "saved\nsaved\n")
    assert not (there / "scontrol.log").exists()


def test_a_slurm_job_that_fails_is_not_requeued(there: Path) -> None:
    (there / "act").write_text("exit 3")
    process = slurm(there)
    process.communicate(timeout=300)
    assert process.returncode == 3
    assert not (there / "scontrol.log").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the project's folder: submit the job from there"),
        ({"SLURM_JOB_ID": ""}, "is a job's script: sbatch"),
        ({"HOSTS": "hosts"}, "HOSTS=hosts: Slurm says which machines there are"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1: Slurm says"),
        ({"NODES": "3"}, "NODES=3, but the job has 2 nodes"),
    ],
)
def test_a_setting_that_a_slurm_job_cannot_use_is_named(there: Path, variables: dict[str, str], words: str) -> None:
    process = slurm(there, script="scripts/slurm.sh" if "sbatch" in words else "../bin/spool", **variables)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert words in err
