"""The launcher with small programs instead of training: all end together, with a report."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from forked import Forked, ran
from plain import plain
from ports import free_port

from qwen35.launch import job
from qwen35.launch.job import Failure
from qwen35.processes import stop_signals

ROOT = Path(__file__).parents[2]
DRIVER = """
import argparse, sys
from qwen35.launch import job
from qwen35.launch.launcher import run
job.FAILURE_GRACE = float(sys.argv[3])
args = argparse.Namespace(nnodes=1, node_rank=0, nproc_per_node=int(sys.argv[1]), master_addr="localhost", master_port=None)
sys.exit(run([sys.executable, "-c", sys.argv[2]], args))
"""
HEAD = """
import os, signal, sys, time
from qwen35.rank import record_failure
rank = int(os.environ["RANK"])
def say(*words):  # one write a line, so that lines of ranks do not mix
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
"""


def start(program: str, processes: int = 2, grace: float = 0.5) -> Forked:
    return Forked(ran, [DRIVER, str(processes), HEAD + program, str(grace)], {})


def first_numbers(process: Forked, count: int) -> list[int]:
    """Those that it prints first, a line each."""
    wait_for(lambda: process.out.count("\n") >= count)
    return [int(line) for line in process.out.splitlines()[:count]]


def wait_for(condition, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


def test_each_rank_gets_its_environment():
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    process = start(f"say(*(os.environ[n] for n in {names}))", 3)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    [port] = {line.split()[-1] for line in out.splitlines()}
    assert int(port) >= 1024
    assert sorted(out.splitlines()) == [f"{r} {r} 3 3 localhost {port}" for r in range(3)]


def test_a_user_error_is_one_line_whichever_rank_fails_first(tmp_path):
    program = f"here = {str(tmp_path / 'here')!r}"
    program += """
own = os.environ['QWEN35_FAILURE_FILE']
if rank == 0:
    open(here, 'w').close()
awaited = here if rank else own.replace('0.json', '1.json')
while not os.path.exists(awaited):
    time.sleep(0.01)
try:
    raise RuntimeError("the peer is gone") if rank else ValueError("a.json, record 3: no such file")
except Exception as error:
    record_failure(error, is_user_error=rank == 0)
    sys.exit(1)
"""
    process = start(program, grace=60)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err == "error: a.json, record 3: no such file\n"


def test_a_crash_is_reported_with_its_traceback_and_ends_the_others():
    program = """
if rank == 1:
    try:
        1 / 0
    except ZeroDivisionError as error:
        record_failure(error, is_user_error=False)
        sys.exit(1)
time.sleep(600)
"""
    process = start(program)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" in err and err.endswith("rank 1: division by zero\n") and err.startswith("error: ")


def test_a_killed_rank_is_reported_before_its_peers_lost_connection():
    program = """
other = os.environ['QWEN35_FAILURE_FILE'].replace('0.json', '1.json')
if rank == 1:
    record_failure(RuntimeError("connection closed by peer"), is_user_error=False)
    sys.exit(1)
while not os.path.exists(other):
    time.sleep(0.01)
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""
    process = start(program, grace=60)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (1, "error: rank 0 was ended by SIGKILL; out of memory?\n")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ('OSError("No space left on device"), is_user_error=True', "error: No space left on device\n"),
        (
            'ZeroDivisionError("division by zero"), is_user_error=False',
            "error: ZeroDivisionError: division by zero\nrank 1: division by zero\n",
        ),
    ],
    ids=["of the user", "of ours"],
)
def test_a_rank_that_hangs_after_its_failure_is_killed_and_the_failure_reported(failure, words):
    program = f"""
if rank == 1:
    record_failure({failure})
time.sleep(600)
"""
    process = start(program)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (1, words)


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 was ended by SIGKILL; out of memory?"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "rank 1 was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 1)", "rank 1 was ended by signal 35"),  # which has no name
        ("os._exit(7)", "rank 1 ended with exit code 7"),
    ],
)
def test_the_end_of_a_rank_without_a_reason_is_described(ending, words):
    process = start(f"if rank == 1:\n    {ending}\ntime.sleep(600)")
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (1, f"error: {words}\n")


def test_kill_9_of_the_launcher_ends_all_ranks():
    process = start("say(os.getpid()); time.sleep(600)", 3)
    pids = first_numbers(process, 3)
    process.kill()
    wait_for(lambda: gone(pids))
    process.communicate()


def test_two_signals_in_one_moment_are_one(monkeypatch):
    """Wherever the second interrupts the handler of the first."""
    before = {number: signal.getsignal(number) for number in stop_signals()}
    sent, clock = [], time.monotonic
    stop = job.Stop(lambda: sent.append("stop"), lambda: sent.append("kill"))

    def interrupted():
        monkeypatch.setattr(job.time, "monotonic", clock)
        stop.handle(signal.SIGINT, None)
        return clock()

    monkeypatch.setattr(job.time, "monotonic", interrupted)
    stop.handle(signal.SIGINT, None)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert (sent, stop.number, stop.is_forced) == (["stop"], signal.SIGINT, False)


def test_a_signal_that_comes_while_the_ranks_start_reaches_each_once():
    """Its handler sends it to those that are there, and who started them to all."""
    before = {number: signal.getsignal(number) for number in stop_signals()}
    starting, sent = job.Job([]), []
    for number, handler in before.items():
        signal.signal(number, handler)
    for rank in range(2):
        starting.processes[rank] = SimpleNamespace(poll=lambda: None, send_signal=lambda n, r=rank: sent.append((r, n)))
        starting.send_signal(signal.SIGTERM)
    starting.send_signal(signal.SIGKILL)
    assert sent == [(0, signal.SIGTERM), (1, signal.SIGTERM), (0, signal.SIGKILL), (1, signal.SIGKILL)]


@pytest.mark.parametrize(
    ("number", "of_ranks", "code"),
    [
        (signal.SIGTERM, 143, 143),
        (signal.SIGHUP, 143, 143),
        (signal.SIGINT, 143, 130),
        (signal.SIGTERM, 0, 0),  # all steps were done by then
        (signal.SIGINT, 0, 0),
    ],
)
def test_a_signal_reaches_every_rank_once_and_they_may_take_their_time(number, of_ranks, code):
    program = (
        f"code = {of_ranks}"
        """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
say(os.getpid())
while not asked:
    time.sleep(0.01)
time.sleep(1.5)
say("saved", len(asked))
sys.exit(code)
"""
    )
    process = start(program)
    pids = first_numbers(process, 2)
    process.send_signal(number)
    process.send_signal(number)  # as from make and from the terminal in one moment
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out.splitlines()[2:]) == (code, ["saved 1", "saved 1"])
    assert plain(err).startswith("stopping: ") and err.count("\n") == 1
    assert gone(pids)


def test_a_second_ctrl_c_stops_at_once():
    process = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); say(os.getpid()); time.sleep(600)")
    pids = first_numbers(process, 2)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: plain(process.err).startswith("stopping"))
    time.sleep(1.1)  # longer than job.DUPLICATE_SIGNAL
    assert not gone(pids)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.endswith("stopped at once; the same command resumes from the newest checkpoint\n")
    assert gone(pids)


def test_a_job_ends_with_its_parent(tmp_path):
    """As scripts/tiny.sh uses it: kill -9 of the script leaves no process behind."""
    outer = "import os, subprocess, sys; env = {**os.environ, 'QWEN35_PARENT': str(os.getpid())}\n"
    outer += "subprocess.run([sys.executable, '-m', 'qwen35.launch', *sys.argv[1:]], env=env)"
    # the ranks sleep before they do anything
    still = "import os, sys, time\nif 'RANK' in os.environ:\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
    (tmp_path / "sitecustomize.py").write_text(still)
    command = [sys.executable, "-c", outer, "--master_port", str(free_port()), "configs/tiny.yaml"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    rank = int(process.stdout.readline())
    launcher = psutil.Process(rank).ppid()
    process.kill()
    wait_for(lambda: gone([rank, launcher]))
    process.stdout.close()
    process.wait()


# -- several nodes ---------------------------------------------------------------------------------

NODE = """
import argparse, sys
from pathlib import Path
from qwen35.launch import job
from qwen35.launch.launcher import run
from qwen35.launch.rendezvous import RendezvousParameters, join
from qwen35.log import logger, set_up_logging
job.FAILURE_GRACE = float(sys.argv[6])
set_up_logging()
node, nodes, port = map(int, sys.argv[1:4])
args = argparse.Namespace(
    nnodes=nodes, node_rank=node, nproc_per_node=2, master_addr="127.0.0.1", master_port=port
)
params = RendezvousParameters(node, nodes, "127.0.0.1", port, 300, "")
logger.setLevel("WARNING")
rendezvous = join(params)
logger.setLevel("INFO")
sys.exit(run([sys.executable, "-c", sys.argv[5]], args, rendezvous))
"""


def start_nodes(program: str, save: Path, nodes: int = 2, grace: float = 0.5) -> list[Forked]:
    port = str(free_port())
    return [
        Forked(ran, [NODE, str(node), str(nodes), port, str(save), HEAD + program, str(grace)], {})
        for node in range(nodes)
    ]


def failure_of(node: int, err: str) -> str:
    """Standard error of a node's launcher, after the line that names its ranks."""
    first, _, rest = plain(err).partition("\n")
    assert first.startswith(f"node {node}: ranks {2 * node} to {2 * node + 1} of 4, rendezvous at 127.0.0.1:"), err
    return rest


def test_a_failure_on_one_node_ends_all_and_is_reported_on_all(tmp_path):
    """The ranks of the other node hang, as in a collective."""
    program = "if rank == 3:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    processes = start_nodes(program, tmp_path)
    ended = [failure_of(node, process.communicate(timeout=300)[1]) for node, process in enumerate(processes)]
    assert [process.returncode for process in processes] == [1, 1]
    words = "rank 3 was ended by SIGKILL; out of memory?"
    assert ended == [f"error: node 1 ended: {words}\n", f"error: {words}\n"]


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_failure_here_is_not_explained_by_its_effect_on_another_node(tmp_path, is_killed):
    """The other node's ranks lose this one's and fail, and its launcher reports that at once.

    Meanwhile a rank hangs here.
    """
    own = "os.kill(os.getpid(), 9)"
    if not is_killed:
        own = "record_failure(ZeroDivisionError('of ours'), is_user_error=False)\n    sys.exit(1)"
    program = f"""
from pathlib import Path
file = Path({str(tmp_path / "pid")!r})
if rank == 2:
    while not Path(os.environ["QWEN35_FAILURE_FILE"]).with_name("elsewhere.json").exists():
        time.sleep(0.01)
    sys.exit(0)
if rank == 3:
    file.with_suffix(".new").write_text(str(os.getpid()))
    file.with_suffix(".new").replace(file)
    {own}
while not file.exists() or os.path.exists(f"/proc/{{file.read_text()}}"):  # until its launcher has seen its end
    time.sleep(0.01)
record_failure(RuntimeError("connection closed by peer"), is_user_error=False)
sys.exit(1)
"""
    (tmp_path / "save").mkdir()
    processes = start_nodes(program, tmp_path / "save", grace=60)
    ended = [failure_of(node, process.communicate(timeout=300)[1]) for node, process in enumerate(processes)]
    assert [process.returncode for process in processes] == [1, 1]
    if is_killed:
        assert ended[1] == "error: rank 3 was ended by SIGKILL; out of memory?\n"
    else:
        own, *others = ended[1].split("\nerror: ")  # on a busy machine the other node's report may come after the end
        assert own.rstrip() == "error: ZeroDivisionError: of ours\nrank 3: of ours"
        assert all(line.startswith("node 0 ended: rank ") for line in others)
    assert "connection closed by peer" in ended[0]


def test_other_nodes_get_one_line_of_a_failure():
    trace = "Traceback (most recent call last):\n  File x\nRuntimeError: no memory\n#12 clone3\n"
    assert Failure(f"{trace}rank 3: no memory\n#12 clone3").summary == "rank 3: no memory"
    assert Failure("rank 3 was ended by SIGKILL").summary == "rank 3 was ended by SIGKILL"
    assert Failure("a.json, record 3: no such file").summary == "a.json, record 3: no such file"


def test_nodes_may_end_at_different_times(tmp_path):
    program = """
while rank < 2 and not os.path.exists(go):
    time.sleep(0.01)
"""
    first, second = start_nodes(f"go = {str(tmp_path / 'go')!r}\n{program}", tmp_path)
    assert failure_of(1, second.communicate(timeout=300)[1]) == "" and second.returncode == 0
    (tmp_path / "go").touch()
    assert failure_of(0, first.communicate(timeout=300)[1]) == "" and first.returncode == 0


def test_kill_9_of_one_launcher_ends_the_other_node(tmp_path):
    first, second = start_nodes("say(os.getpid()); time.sleep(600)", tmp_path)
    numbers = []
    for process in (first, second):
        numbers += first_numbers(process, 2)
    second.kill()
    err = failure_of(0, first.communicate(timeout=300)[1])
    assert (first.returncode, err) == (
        1,
        "error: node 1 ended: its launcher is gone (killed, or the machine is down)\n",
    )
    wait_for(lambda: gone(numbers))
    second.communicate()


def test_a_stop_before_the_first_step_says_that_nothing_was_saved():
    process = start("say(rank); time.sleep(600)")  # SIGTERM still has its default action
    first_numbers(process, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert err.endswith("stopped outside of the training steps: there was nothing to save\n")


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qwen35.launch", *arguments, "configs/tiny.yaml"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_port_in_use_and_an_unknown_host_are_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launch("--master_port", str(port))
        assert done.returncode == 1
        words = (
            f"error: MASTER_PORT={port} cannot be used on this machine (Address already in use): another program has it"
        )
        assert done.stderr.startswith(words) and done.stderr.count("\n") == 1
    done = launch("--master_addr", "no.such.machine.invalid")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "MASTER_ADDR=no.such.machine.invalid: no host of that name is known here" in done.stderr


def test_a_low_limit_of_open_files_is_named():
    command = f'ulimit -n 16; exec "{sys.executable}" -m qwen35.launch configs/tiny.yaml'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    words = "error: ulimit -n is 16: each process of a run needs at least 256 open files\n"
    assert (done.returncode, done.stderr) == (1, words)


def test_ranks_share_the_cores(monkeypatch):
    import argparse

    from qwen35.launch.launcher import rank_environments

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of another launcher")
    args = argparse.Namespace(nnodes=2, node_rank=1, nproc_per_node=2, master_addr="a", master_port=1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    here = rank_environments(args, Path("x"))
    assert list(here) == [2, 3]
    assert {e["OMP_NUM_THREADS"] for e in here.values()} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert [e["LOCAL_RANK"] for e in here.values()] == ["0", "1"]
    assert not any("TORCHELASTIC_RUN_ID" in e for e in here.values())
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert {e["OMP_NUM_THREADS"] for e in rank_environments(args, Path("x")).values()} == {"5"}
