"""Two nodes on this machine: real launchers that compare, measure, and train as one node does."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import PATHS, Forked, launched
from plain import plain
from ports import free_port
from training_runs import ROOT, make_workplace, train

from qwen35.preflight import PreflightError, measure


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


def command_of(node: int, port: int, *arguments: str) -> list[str]:
    rendezvous = ["--nnodes", "2", "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [sys.executable, "-m", "qwen35.launch", *rendezvous, *arguments]


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NODE_ADDR": "127.0.0.1", "RENDEZVOUS_SECRET": "a secret of the tests"}


def start(workplace: Path, node: int, port: int, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        command_of(node, port, *arguments),
        cwd=cwd,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": PATHS} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fork(node: int, port: int, *arguments: str) -> Forked:
    """The same without a start of Python."""
    return Forked(launched, command_of(node, port, *arguments), ENVIRONMENT)


def ends(*processes: subprocess.Popen | Forked) -> list[tuple[int, str, str]]:
    outputs = [process.communicate(timeout=300) for process in processes]
    return [
        (process.returncode, plain(out), plain(err)) for process, (out, err) in zip(processes, outputs, strict=True)
    ]


def without_waiting(err: str) -> list[str]:
    return [line for line in err.splitlines() if ": waiting for " not in line]


def steps(save: Path) -> list[dict]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "loss", "grad_norm", "lr", "tokens")} for line in lines]


def strangers(port: int) -> list[socket.socket]:
    """Open connections to node 0, once it listens: some silent, some with false messages."""
    found: list[socket.socket] = []
    lies = (
        b'{"node_rank": 1, "nnodes": 3}\n',
        b'{"node_rank": 1, "nnodes": 2, "proof": "0"}\n',
        b"\xff" * 5000,
        b"",
        b"",
    )
    end = time.monotonic() + 120
    while len(found) < 30:
        assert time.monotonic() < end
        with contextlib.suppress(ConnectionRefusedError):
            found.append(socket.create_connection(("127.0.0.1", port)))
            found[-1].sendall(lies[len(found) % len(lies)])
    return found


def test_two_nodes_train_as_one_does(workplace, tmp_path):
    """While strangers hold connections to their port."""
    recipe, port = str(workplace / "recipe.yaml"), free_port()
    settings = ["training.train_iters=3", "training.log_interval=1", "data.dataloader_param.num_workers=0"]
    save = tmp_path / "two"
    node_0 = fork(0, port, recipe, f"training.save={save}", *settings)
    connections = strangers(port)
    both = ends(fork(1, port, recipe, f"training.save={save}", *settings), node_0)
    for connection in connections:
        connection.close()
    assert [code for code, *_ in both] == [0, 0], both
    (_, _, second), (_, first_log, first) = both
    where = f"of 2, rendezvous at 127.0.0.1:{port}"
    assert without_waiting(first)[-1] == f"node 0: ranks 0 to 0 {where}"
    assert without_waiting(second)[-1] == f"node 1: ranks 1 to 1 {where}; the log is on node 0"
    assert first_log.count("all-reduce over 2 ranks of 2 nodes: ") == 1
    one = train(workplace, tmp_path / "one", 2, *settings)
    assert one.returncode == 0, one.stderr
    assert "all-reduce" not in one.stdout
    assert steps(save) == steps(tmp_path / "one")
    assert len(steps(save)) == 3


def test_a_node_that_never_comes_is_named(workplace, tmp_path):
    recipe, port, save = str(workplace / "recipe.yaml"), free_port(), f"training.save={tmp_path / 'save'}"
    alone = start(workplace, 0, port, recipe, save, "--rendezvous_timeout", "2")
    [(code, out, err)] = ends(alone)
    words = f"error: node 1 of 2 did not connect to MASTER_PORT={port} of node 0 within 2 s: was the run started there"
    assert (code, out) == (1, "") and without_waiting(err)[-1].startswith(words)
    assert not list(tmp_path.iterdir())


def test_nodes_of_another_torch_do_not_start(workplace, tmp_path):
    (tmp_path / "torch-9.9.9.dist-info").mkdir()
    (tmp_path / "torch-9.9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    recipe, port, save = str(workplace / "recipe.yaml"), free_port(), f"training.save={tmp_path / 'save'}"
    both = [
        start(workplace, node, port, recipe, save, PYTHONPATH=f"{tmp_path}:{PATHS}" if node else PATHS)
        for node in range(2)
    ]
    for code, out, err in ends(*both):
        assert (code, out) == (1, "")
        [line] = without_waiting(err)
        assert (
            line.startswith("error: node 1 (127.0.0.1) has Python 3.")
            and ", torch 9.9.9, NPUS_PER_NODE=1; node 0: " in line
        )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_waiting_launcher_can_be_stopped(workplace, tmp_path, number, code):
    process = start(workplace, 0, free_port(), str(workplace / "recipe.yaml"), f"training.save={tmp_path / 'save'}")
    assert plain(process.stderr.readline()).startswith("node 0: waiting for node 1 of 2")
    process.send_signal(number)
    assert ends(process) == [(code, "", "stopped before anything was started\n")]
    assert not list(tmp_path.iterdir())


def test_a_save_folder_that_is_not_shared_is_refused(workplace, tmp_path):
    """The same path, but different folders: as on local disks of each node."""
    port, recipe = free_port(), str(workplace / "recipe.yaml")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    both = [
        start(workplace, node, port, "--preflight", recipe, "training.save=save", cwd=tmp_path / name)
        for node, name in enumerate(("a", "b"))
    ]
    for code, out, err in ends(*both):
        assert (code, out) == (1, "")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in err
        assert errors[0].startswith("error: node 1 does not see what node 0 writes in save: name a training.save")
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


# -- what the ranks measure ------------------------------------------------------------------------


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_wrong_sum_is_an_error(alone, monkeypatch):
    said = []
    measure(torch.device("cpu"), said.append)
    assert len(said) == 1 and said[0].startswith("all-reduce over 1 ranks of 1 node: 64 MiB in ")

    def all_reduce(tensor, *op):
        if len(tensor) > 1:
            tensor[-1] = 2

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(PreflightError, match=r"rank 0: an all-reduce of 1 ones gives 2\.0 somewhere"):
        measure(torch.device("cpu"), said.append)
    assert len(said) == 1


def test_a_rank_on_another_device_is_named(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), [own, own, "A3"]))
    with pytest.raises(PreflightError, match="rank 2 computes on A3, rank 0 on cpu"):
        measure(torch.device("cpu"), print)
