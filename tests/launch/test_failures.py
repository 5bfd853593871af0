"""When something dies: what is reported, what stays, how the job resumes. Real processes."""

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from forked import ROOT, Forked, launched, run_code
from ports import free_port
from training_runs import SAME, WORKER, assert_same_run

from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.config.load import load_settings
from qwen35.device import HOST
from qwen35.heartbeat import HEARTBEAT, Heartbeat
from qwen35.launch.watchdog import Watch, Watchdog, plogs
from qwen35.train import setup
from qwen35.training.metrics import read_metrics

# saves in the background could be incomplete when a rank hangs in C or dies two steps later
SAVED = ("training.save_interval=5", "training.async_save=false", WORKER)


def start(workplace, save: Path, faults: str, *overrides: str, nodes=(1, 0, 2), port=0, restarts=0, **env: str):
    numbers = [*nodes, port or free_port(), restarts]
    command = [sys.executable, str(ROOT / "tests/faults.py"), "launch", *map(str, numbers)]
    words = [*command, str(workplace / "recipe.yaml"), f"training.save={save}", *overrides]
    return Forked(launched, words, {"FAULTS": faults} | env)


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_a_run_with_a_hang_and_a_kill_ends_as_one_without(workplace, two, tmp_path):
    """A rank hangs in C and holds the GIL; after the restart one is killed; then it completes."""
    logs = tmp_path / "log" / "debug" / "plog"
    logs.mkdir(parents=True)
    env = {"ASCEND_PROCESS_LOG_PATH": str(tmp_path / "log")}
    done = run(workplace, tmp_path / "run", "0:1:7:hang 1:0:9:kill", *SAVED, restarts=2, **env)
    assert done.returncode == 0, done.stderr
    hung, killed, last = done.stderr.split("from the newest checkpoint\n")
    assert not last
    where = "step 7: micro-batch 1 of 1, forward"
    assert (
        hung.endswith(f" s (training.timeout): {where}\nrestart 1 of 2, ") and "error: rank 1 has stood still" in hung
    )
    positions = [line for line in hung.splitlines() if line.startswith("  rank ")]
    assert [line.split(" (")[0] for line in positions] == ["  rank 0", "  rank 1"]
    assert f"): {where}, for " in positions[1] and "): step 7: " in positions[0]
    stacks = {part.split(":")[0]: part for part in hung.split("stacks of rank ")[1:]}
    assert stacks.keys() == {"0", "1"}
    assert "in hang_in_c" in stacks["1"] and "in train_step" in stacks["1"]
    assert "in train_step" in stacks["0"] and "hang_in_c" not in stacks["0"]
    assert f"CANN's log: {tmp_path / 'log'}, which has nothing of these processes" in hung
    assert "error: rank 0 was ended by SIGKILL; out of memory?\nrestart 2 of 2, " in killed
    assert re.search(r"step 9: micro-batch 1 of 1, forward, for \d+ s; was ended by SIGKILL", killed)
    assert done.stdout.count("iter_0000005") >= 2 and done.stdout.count("steps 6 to 10:") == 2
    assert_same_run(tmp_path / "run", two)


def test_two_nodes_restart_together_and_end_together(workplace, two, tmp_path):
    """A killed rank: both launchers restart their ranks. A killed launcher: the other ends."""
    port, save = free_port(), tmp_path / "run"
    faults = "0:1:7:kill 1:1:9:kill-launcher"
    both = [start(workplace, save, faults, *SAVED, nodes=(2, i, 1), port=port, restarts=2) for i in (0, 1)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [1, -signal.SIGKILL], errors
    assert (
        "error: rank 1 was ended by SIGKILL; out of memory?\nrestart 1 of 2, from the newest checkpoint\n" in errors[1]
    )
    first, second = errors[0].split("restart 1 of 2, from the newest checkpoint\n")
    assert "  rank 0 (process " in first and "step 7: micro-batch 1 of 1, " in first
    assert "step 9: micro-batch 1 of 1, " in second and "restart" not in second
    assert second.splitlines()[-1] == "error: node 1 ended: its launcher is gone (killed, or the machine is down)"
    assert newest_checkpoint(save).name == "iter_0000005"
    lines, wanted = (read_metrics(folder / "metrics.jsonl") for folder in (save, two))
    assert [[line[k] for k in SAME] for line in lines] == [[line[k] for k in SAME] for line in wanted[: len(lines)]]
    assert 5 <= len(lines) <= 8


def test_two_nodes_restart_and_end_as_a_run_that_nobody_killed(workplace, two, tmp_path):
    port, save = free_port(), tmp_path / "run"
    both = [start(workplace, save, "0:1:7:kill", *SAVED, nodes=(2, i, 1), port=port, restarts=1) for i in (0, 1)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert all(err.count("restart 1 of 1, from the newest checkpoint\n") == 1 for err in errors)
    assert_same_run(save, two)


def test_two_nodes_restart_at_another_port_if_theirs_is_taken(workplace, two, tmp_path):
    """Another program takes the port of rank 0's store between that rank's end and the restart."""
    port, save = free_port(), tmp_path / "run"
    both = [start(workplace, save, "0:0:7:kill", *SAVED, nodes=(2, i, 1), port=port, restarts=1) for i in (0, 1)]
    while not (save / "config.yaml").exists():  # it appears once the ranks have met
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)
    both[0].send_signal(signal.SIGSTOP)
    taken = None
    while taken is None:
        time.sleep(0.01)
        with contextlib.suppress(OSError):
            taken = socket.create_server(("", port))
    both[0].send_signal(signal.SIGCONT)
    with taken:
        errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert all(err.count("restart 1 of 1, from the newest checkpoint\n") == 1 for err in errors)
    assert_same_run(save, two)


def test_a_save_of_40_seconds_outlasts_every_way_to_stop(workplace, tmp_path):
    """No launcher loses its patience, also not that of another node."""
    port, endless = free_port(), ("training.train_iters=100000", "training.log_interval=1", WORKER)
    options = [
        (signal.SIGTERM, (1, 0, 2), free_port(), "term"),
        (signal.SIGINT, (1, 0, 2), free_port(), "int"),
        *((signal.SIGTERM, (2, node, 1), port, "nodes") for node in (0, 1)),
    ]
    jobs = [
        start(workplace, tmp_path / name, "", *endless, nodes=nodes, port=own_port, SAVE_SECONDS="40")
        for _, nodes, own_port, name in options
    ]
    # at once, as steps cost more than a save that waits; the second node hears of it from the first
    for job, (number, _, _, name) in zip(jobs[:-1], options[:-1], strict=True):
        end = time.monotonic() + 300
        while not (tmp_path / name / "metrics.jsonl").exists():
            assert time.monotonic() < end and all(other.poll() is None for other in jobs)
            time.sleep(0.05)
        job.send_signal(number)
    asked = time.monotonic()
    errors = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [143, 130, 143, 143], errors
    assert time.monotonic() - asked > 40 and not any("Traceback" in err for err in errors)
    for name in ("term", "int", "nodes"):
        assert int(newest_checkpoint(tmp_path / name).name[5:]) == len(read_metrics(tmp_path / name / "metrics.jsonl"))


def test_nan_is_named_and_never_saved(workplace, tmp_path):
    """Two steps before a log step with a save; no restart, which would meet the same again."""
    save = tmp_path / "run"
    settings = ("training.save_interval=8", "training.log_interval=100", "training.async_save=false")
    done = run(workplace, save, "0:0:6:nan", *settings, restarts=1)
    assert done.returncode == 1
    assert done.stderr.startswith("error: step 6: loss ") and done.stderr.count("\n") == 1
    assert (
        "grad_norm nan: not a number, in the gradient of all groups; stopped, and nothing saved since." in done.stderr
    )
    assert not list(save.glob("iter_*"))
    assert [line["step"] for line in read_metrics(save / "metrics.jsonl")] == list(range(1, 9))


def test_a_launcher_reads_the_heartbeat_and_the_stacks_of_a_rank(monkeypatch):
    """A long activity is cut; without a launcher a heartbeat reaches nobody."""
    watch = Watch(timeout=50.0)
    start, deadline, activity = watch.read()
    assert (deadline - start, activity) == (50.0, "")
    monkeypatch.setenv(HEARTBEAT, str(watch.descriptor))
    heartbeat = Heartbeat(7.0)
    heartbeat.at("reading é" + "x" * 500)
    start, deadline, activity = watch.read()
    assert 0 <= time.monotonic() - start < 5 and deadline - start == pytest.approx(7.0)
    assert activity.startswith("reading éx") and 200 < len(activity) <= 240
    heartbeat.at("joining", 100.0)
    start, deadline, activity = watch.read()
    assert (activity, round(deadline - start)) == ("joining", 100)
    assert watch.stacks() == ""
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "in test_a_launcher_reads_the_heartbeat" in watch.stacks()
    monkeypatch.delenv(HEARTBEAT)
    Heartbeat().at("alone")
    assert watch.read()[2] == "joining"


def test_a_heartbeat_is_never_read_half_written():
    """While a process writes one after the other, it never seems stalled or not begun."""
    watch = Watch(timeout=-1.0)
    program = (
        "from qwen35.heartbeat import Heartbeat\nheartbeat = Heartbeat(600.0)\nwhile True:\n    heartbeat.at('step 1')"
    )
    environment = os.environ | {HEARTBEAT: str(watch.descriptor)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, pass_fds=[watch.descriptor])
    try:
        while not watch.read()[2]:
            assert process.poll() is None
        end = time.monotonic() + 1
        while (now := time.monotonic()) < end:
            start, deadline, activity = watch.read()
            assert deadline > now and start > 0 and activity == "step 1"
    finally:
        process.kill()
        process.wait()


def test_a_worker_that_has_ended_does_not_keep_the_other_stacks_back(monkeypatch):
    monkeypatch.setattr("qwen35.launch.watchdog.STACK_TIMEOUT", 0.1)
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr("qwen35.launch.watchdog.children", lambda pid: [ended.pid])
    watchdog = Watchdog([0], None)
    monkeypatch.setenv(HEARTBEAT, str(watchdog.watches[0].descriptor))
    Heartbeat(7.0).at("step 3: waiting for its data")
    with subprocess.Popen(["sleep", "600"]) as process:  # which SIGUSR1 ends
        watchdog.collect_stacks({0: process})
    assert f"worker {ended.pid} of the loader" in watchdog.watches[0].stacks()
    faulthandler.unregister(signal.SIGUSR1)
    watchdog.close()


def test_each_part_of_the_weights_has_a_heartbeat(workplace, two, tmp_path):
    """From a Hugging Face folder and from a checkpoint: training.timeout holds for each part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for origin, save in ((workplace / "weights", tmp_path), (two / "iter_0000010", two)):
        settings = load_settings(workplace / "recipe.yaml", [f"training.save={save}", "training.micro_batch_size=2"])
        activities = []
        run = setup(settings, HOST, SimpleNamespace(at=activities.append))
        count = len(list(run.model.parameters()))
        count *= 1 if save == tmp_path else 3  # and AdamW's two moments of each
        assert activities.count(f"loading {origin}") == 1 + count
    dist.destroy_process_group()


def test_each_record_has_a_heartbeat(workplace, tmp_path):
    """Also skipped ones, those of the validation set, and those read again for its answers."""
    records = json.loads((workplace / "records.json").read_text())
    records[3] = records[5] = {"id": "\ud800"}  # not valid text
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "held_out.json").write_text(json.dumps(records[:4]))
    own, held_out = (f"data.{name}.basic_parameters" for name in ("dataset_param", "val_dataset_param"))
    flat = [
        f"{own}.dataset={tmp_path / 'records.json'}", f"{own}.on_bad_record=skip", f"training.save={tmp_path}",
        f"{held_out}.dataset={tmp_path / 'held_out.json'}", "training.val_interval=3", "training.val_generate=true",
    ]  # fmt: skip
    activities = []

    def at(activity):
        activities.append(activity)
        heartbeat.at(activity)

    heartbeat = Heartbeat()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    setup(load_settings(workplace / "recipe.yaml", flat), HOST, SimpleNamespace(at=at))
    dist.destroy_process_group()
    read = re.findall(
        rf"^reading the data: {tmp_path}/(\w+)\.json(?:, record (\d+))?", "\n".join(activities), re.MULTILINE
    )
    again = [("held_out", str(i)) for i in range(1, 5)]
    assert read == [
        ("records", ""), *(("records", str(i)) for i in range(1, len(records) + 1)), ("held_out", ""), *again, *again
    ]  # fmt: skip


def test_the_logs_of_cann_are_found_where_it_writes_them(tmp_path, monkeypatch):
    for name in ("ASCEND_PROCESS_LOG_PATH", "ASCEND_WORK_PATH", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plogs([12]) == []  # no CANN here
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend")
    assert plogs([12]) == [f"CANN's log: {tmp_path}/ascend/log, which does not exist"]
    folder = tmp_path / "work" / "log" / "debug" / "plog"
    folder.mkdir(parents=True)
    for pid in (1, 12, 123):
        (folder / f"plog-{pid}_20260101000000000.log").touch()
    monkeypatch.setenv("ASCEND_WORK_PATH", str(tmp_path / "work"))
    assert plogs([12]) == [f"CANN's log: {folder}/plog-12_20260101000000000.log"]
    assert plogs([7]) == [f"CANN's log: {tmp_path}/work/log, which has nothing of these processes"]
    monkeypatch.setenv("ASCEND_PROCESS_LOG_PATH", str(folder.parent))
    assert plogs([12, 123]) == [f"CANN's log: {folder}/plog-{pid}_20260101000000000.log" for pid in (12, 123)]


# -- the launcher alone, with small programs instead of training -----------------------------------

DRIVER = """
import argparse, sys
from qwen35.launch import job
from qwen35.launch.launcher import run
job.FAILURE_GRACE = 0.5
port = int(sys.argv[1]) or None
args = argparse.Namespace(nnodes=1, node_rank=0, nproc_per_node=2, master_addr="localhost", master_port=port)
sys.exit(run([sys.executable, "-c", sys.argv[4]], args, None, float(sys.argv[2]), int(sys.argv[3])))
"""
HEAD = """
import os, signal, sys, time
from qwen35.rank import record_failure
from qwen35.processes import die_with
from qwen35.heartbeat import Heartbeat
rank, restart = int(os.environ["RANK"]), int(os.environ.get("QWEN35_RESTART", "0"))
"""


def launch(program: str, timeout: float = 600, restarts: int = 0, port: int = 0, how: Callable = run_code):
    return how(DRIVER, str(port), str(timeout), str(restarts), HEAD + program)


def started(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """As run_code, with starts of Python, whose end is the point of some tests."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("is_given", [False, True])
def test_restarts_are_counted_and_use_a_free_port(is_given):
    program = """
if rank == 0:
    print("port", os.environ["MASTER_PORT"], "restart", restart, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    port = free_port() if is_given else 0
    done = launch(program, restarts=2, port=port)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[3] for line in lines] == ["0", "1", "2"]
    assert all(int(line[1]) >= 1024 for line in lines) and (int(lines[0][1]) == port) == is_given
    report = "error: rank 0 was ended by SIGKILL; out of memory?\nrestart {} of 2, from the newest checkpoint\n"
    assert done.stderr == (report * 3).format(1, 2, 3).replace("restart 3 of 2, from the newest checkpoint\n", "")
    assert done.returncode == 1


def test_a_user_error_is_not_retried():
    program = """
if rank == 1:
    Heartbeat(600).at("step 3: saving the checkpoint")
    record_failure(OSError(28, "No space left on device"), is_user_error=True)
    sys.exit(1)
time.sleep(600)
"""
    done = launch(program, restarts=3)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.parametrize("where", ["in the first group", "in another one"])
def test_a_rank_killed_while_they_connect_is_restarted(where):
    """The other rank's connection breaks: no setting is blamed."""
    program = """
from qwen35.device import host_group, init_process, loopback_store
if is_first and rank == 0:
    loopback_store(60)  # which ends with this rank
else:
    init_process()
if rank == 0 and restart == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1 or not is_first:
    host_group(60)
"""
    program = f"is_first = {where == 'in the first group'}\n{program}"
    done = launch(program, restarts=1)
    report = "error: rank 0 was ended by SIGKILL; out of memory?\nrestart 1 of 1, from the newest checkpoint\n"
    assert report in done.stderr and "GLOO_SOCKET_IFNAME" not in done.stderr and "MASTER_PORT" not in done.stderr


def test_a_group_of_the_hosts_is_never_freed():
    """The destructor of torch 2.7's waits for a thread that needs the GIL, which it holds."""
    program = """
import torch.distributed as dist
from qwen35.device import end_process_group, host_group, init_process
init_process()
kept, other = host_group(60), dist.new_group(backend="gloo")
references = sys.getrefcount(kept) - sys.getrefcount(other)
dist.destroy_process_group(kept)
end_process_group()
if references != 1 or not dist.is_initialized():
    record_failure(RuntimeError(f"{references} more"), is_user_error=True)
    sys.exit(1)
"""
    done = launch(program, how=started)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_rank_without_any_heartbeat_has_stalled():
    done = launch("time.sleep(600)", timeout=1.0)
    assert done.returncode == 1
    words = r"error: rank [01] has stood still for \d+ s \(training\.timeout\): before it began\n"
    assert re.fullmatch(words, done.stderr), done.stderr


def test_an_internal_error_is_reported_though_a_peer_writes_no_stack():
    """Rank 0 fails with a reason; rank 1 is stopped, cannot write its stack, and is killed."""
    program = """
Heartbeat(600).at(f"step 4: here is rank {rank}")
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
while "T (stopped)" not in states():
    time.sleep(0.01)
try:
    1 / 0
except ZeroDivisionError as error:
    record_failure(error, is_user_error=False)
    sys.exit(1)
"""
    states = """
def states():
    pids = open(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read().split()
    return "".join(open(f"/proc/{pid}/status").read() for pid in pids)
"""
    done = launch(states + program)
    assert done.returncode == 1
    assert "): step 4: here is rank 0, for " in done.stderr and "s; division by zero\n" in done.stderr
    assert "): step 4: here is rank 1, for " in done.stderr
    assert "stacks of" not in done.stderr
    assert done.stderr.endswith("rank 0: division by zero\n") and "Traceback" in done.stderr


def test_the_stack_of_a_loader_that_hangs_is_reported(tmp_path, monkeypatch):
    """Ranks at the same place share one stack."""
    program = """
def read_an_image():
    time.sleep(600)
heartbeat, (reader, writer) = Heartbeat(600), os.pipe()
if not os.fork():
    die_with(os.getppid())
    os.write(writer, b"x")
    read_an_image()
os.read(reader, 1)
heartbeat.at("step 9: waiting for its data")
open(os.environ["RENDEZVOUS_FILE"] + str(rank), "w").close()
while not all(os.path.exists(os.environ["RENDEZVOUS_FILE"] + str(other)) for other in range(2)):
    time.sleep(0.01)
if rank == 1:
    heartbeat.at("step 9: waiting for its data", 0.0)
time.sleep(600)
"""
    monkeypatch.setenv("RENDEZVOUS_FILE", str(tmp_path / "here"))
    done = launch(program)
    assert done.returncode == 1
    assert done.stderr.count("in read_an_image") == 2
    assert done.stderr.count("of the loader\n") == 2 and done.stderr.count("): step 9: waiting for its data, for ") == 2
    words = r"error: rank 1 has stood still for \d+ s \(training\.timeout\): step 9: waiting for its data\n"
    assert re.search(words, done.stderr), done.stderr
