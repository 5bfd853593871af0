"""The rendezvous of launchers: threads instead of nodes, real sockets, no torch."""

import contextlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from ports import free_port

from qwen35.config.load import SettingError, load_settings
from qwen35.launch.connection import Peer, PeerLost
from qwen35.launch.consistency import disagreements, facts, marker_file, node_names, sees_marker
from qwen35.launch.handshake import authenticate
from qwen35.launch.rendezvous import LocalNode, Rendezvous, RendezvousError, RendezvousParameters, join, listen
from qwen35.network import interface_of

ROOT = Path(__file__).parents[2]
SECRET = "a secret of the tests"


class Nodes:
    """Each joins the rendezvous in a thread of its own; keeps what each logged and how it ended."""

    def __init__(self, count: int, save: Path, timeout: float = 60):
        self.params = RendezvousParameters(0, count, "127.0.0.1", free_port(), timeout, SECRET)
        self.save = save
        self.logged: dict[int, list[str]] = {}
        self.ended: dict[int, Rendezvous | str] = {}
        self.threads: list[threading.Thread] = []

    def start(self, node: int, node_facts: Mapping[str, str] | Callable = {"torch": "2.7.1"}, **changes) -> None:  # noqa: B006
        logged = self.logged.setdefault(node, [])
        called = node_facts if callable(node_facts) else lambda: node_facts
        local = replace(LocalNode(called, self.save, logged.append, file_timeout=0.2), **changes.pop("local", {}))
        params = replace(self.params, node_rank=node, **changes)

        def run():
            try:
                self.ended[node] = join(params, local)
            except RendezvousError as error:
                self.ended[node] = str(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.threads.append(thread)

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()

    def assert_joined(self) -> None:
        assert all(isinstance(end, Rendezvous) for end in self.ended.values()), self.ended

    def close(self) -> None:
        for rendezvous in self.ended.values():
            if isinstance(rendezvous, Rendezvous):
                rendezvous.close(None)


def authenticated(connection: socket.socket, nodes: Nodes, node: int) -> Peer:
    peer = Peer(connection, "")
    assert authenticate(peer, replace(nodes.params, node_rank=node))
    return peer


@contextlib.contextmanager
def at_the_port(nodes: Nodes):
    """A connection to node 0, once it listens."""
    connection = None
    while connection is None:
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", nodes.params.port))
    with connection:
        yield connection


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_nodes_that_agree_start_and_the_port_is_free(tmp_path, order):
    nodes = Nodes(3, tmp_path / "runs" / "new")
    for node in order:
        nodes.start(node)
    nodes.wait()
    nodes.assert_joined()
    assert not list(tmp_path.iterdir())  # the folder that the marker file needed is gone
    listen(nodes.params.port).close()  # while the nodes are still connected
    assert all("up to 60 s more" in line for logged in nodes.logged.values() for line in logged)
    nodes.close()


def test_missing_nodes_are_logged_and_named_in_the_error(tmp_path):
    nodes = Nodes(4, tmp_path, timeout=2)
    nodes.start(0)
    nodes.start(2)
    nodes.wait()
    expected = (
        f"nodes 1, 3 of 4 did not connect to MASTER_PORT={nodes.params.port} of node 0 within 2 s: was the run"
        " started there, with NODES=4, its own NODE_RANK and the MASTER_ADDR of node 0?"
    )
    assert nodes.ended == {0: expected, 2: expected}
    assert nodes.logged[0][0].startswith(f"node 0: waiting for nodes 1 to 3 of 4 (port {nodes.params.port}), up to 2 s")
    assert "node 2: waiting for nodes 1, 3 of 4" in "\n".join(nodes.logged[2])


def test_a_missing_node_0_is_named_with_its_address(tmp_path):
    nodes = Nodes(2, tmp_path, timeout=1)
    nodes.start(1)
    nodes.wait()
    where = f"node 0 at 127.0.0.1:{nodes.params.port}"
    assert nodes.ended[1].startswith(f"{where} did not answer within 1 s: Connection refused")
    assert nodes.logged[1][0].startswith(f"node 1: waiting for {where} (Connection refused), up to 1 s more")


def test_another_program_at_the_port_is_recognised(tmp_path):
    nodes = Nodes(2, tmp_path, timeout=1)
    with socket.create_server(("127.0.0.1", nodes.params.port)) as server:
        nodes.start(1)
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-OpenSSH\r\n")
        connection.close()
        server.close()
        nodes.wait()
    assert "what answers there is not a launcher" in "\n".join(nodes.logged[1])


def test_a_stranger_is_logged_and_does_no_harm(tmp_path):
    nodes = Nodes(2, tmp_path)
    nodes.start(0)
    with at_the_port(nodes) as connection:
        connection.sendall(b'GET / HTTP/1.0\r\n[[[[\n{"node_rank": "x"}\n')
        connection.recv(100)
        nodes.start(1)
        nodes.wait()
    nodes.assert_joined()
    assert any("a connection from 127.0.0.1 is not a launcher" in line for line in nodes.logged[0])
    nodes.close()


def test_a_node_that_leaves_may_come_again(tmp_path):
    nodes = Nodes(3, tmp_path)
    nodes.start(0)
    with at_the_port(nodes) as connection:
        peer = authenticated(connection, nodes, 1)
        while (peer.receive(20) or {})["waiting"] != "node 2 of 3":
            pass
    nodes.start(1)
    nodes.start(2)
    nodes.wait()
    nodes.assert_joined()
    assert "node 0: node 1 (127.0.0.1) has left" in nodes.logged[0]
    nodes.close()


@pytest.mark.parametrize(
    ("node", "changes", "message_of_all"),
    [
        (1, {"nnodes": 2}, "node 1 (127.0.0.1) has NODES=2, node 0 has NODES=3"),
        (2, {}, "two nodes have NODE_RANK=2: 127.0.0.1 and 127.0.0.1"),
    ],
)
def test_nodes_whose_numbers_contradict_end_all(tmp_path, node, changes, message_of_all):
    nodes = Nodes(3, tmp_path)
    nodes.start(0)
    with at_the_port(nodes) as connection:
        peer = authenticated(connection, nodes, 2)
        nodes.start(node, **changes)
        nodes.wait()
        while "error" not in (message := peer.receive(20)):
            pass
    assert [nodes.ended[0], nodes.ended[node], message["error"]] == [message_of_all] * 3


def test_disagreements_are_one_line_each_and_nothing_starts(tmp_path):
    nodes = Nodes(4, tmp_path)
    here = {"torch": "2.7.1", "training.lr": "1e-05", "data/a.json": "10 bytes (aa)"}
    nodes.start(0, here)
    nodes.start(1, here | {"training.lr": "2e-05", "HCCL_BUFFSIZE": "400"})
    nodes.start(2, {k: v for k, v in here.items() if k != "data/a.json"})
    nodes.start(3, here | {"training.lr": "2e-05"})
    nodes.wait()
    lr = "nodes 1, 3 have training.lr: 2e-05; node 0: 1e-05"
    data = "node 2 has data/a.json: none; node 0: 10 bytes (aa)"
    buffer = "node 1 has HCCL_BUFFSIZE: 400; node 0: none"
    shown = {node: [line for line in logged if "waiting" not in line] for node, logged in nodes.logged.items()}
    assert shown == {0: [lr, data, buffer], 1: [lr, buffer], 2: [data], 3: [lr]}
    assert set(nodes.ended.values()) == {"the nodes differ in 3 things, listed above: nothing was started"}


@pytest.mark.parametrize("node", [0, 1])
def test_a_file_that_a_node_cannot_read_is_named(tmp_path, node):
    def unreadable():
        raise PermissionError(13, "Permission denied", "data/a.json")

    nodes = Nodes(2, tmp_path)
    nodes.start(node, unreadable)
    nodes.start(1 - node)
    nodes.wait()
    assert [nodes.ended[n] for n in (0, 1)] == [f"node {node}: data/a.json: Permission denied"] * 2


def test_a_save_folder_that_is_not_shared_is_refused(tmp_path):
    nodes = Nodes(3, tmp_path / "here")
    nodes.start(0)
    nodes.start(1)
    nodes.start(2, local={"save": tmp_path / "there"})
    nodes.wait()
    [words] = set(nodes.ended.values())
    assert words.startswith(f"node 2 does not see what node 0 writes in {tmp_path / 'here'}: name a training.save")
    assert not list(tmp_path.iterdir())


def test_a_marker_file_that_appears_late_is_seen(tmp_path, monkeypatch):
    """As on a network file system, which caches listings."""
    looks = []
    real = Path.iterdir

    def iterdir(path):
        looks.append(path)
        return iter(()) if len(looks) < 7 else real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr("qwen35.launch.consistency.time.sleep", lambda _: None)
    with marker_file(tmp_path / "runs") as marker:
        assert sees_marker(tmp_path / "runs", marker, 20)
        assert [path.name for path in real(tmp_path / "runs")] == [marker]
    assert not list(real(tmp_path))


def test_a_save_folder_in_use_is_not_removed(tmp_path):
    with marker_file(tmp_path / "runs"):
        (tmp_path / "runs/metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("ahead", "words"), [(75, "75 s ahead of"), (-3600, "3600 s behind"), (1, None)])
def test_clocks_are_reported_and_never_refused(tmp_path, ahead, words):
    nodes = Nodes(2, tmp_path)
    nodes.start(0, local={"clock": lambda: 1e9})
    nodes.start(1, local={"clock": lambda: 1e9 + ahead})
    nodes.wait()
    nodes.assert_joined()
    notes = [line for line in nodes.logged[0] if line.startswith("note")]
    assert (words is None and not notes) or f"the clock of node 1 is {words} node 0's" in notes[0]
    nodes.close()


def test_all_nodes_learn_how_one_ends(tmp_path):
    nodes = Nodes(4, tmp_path)
    for node in range(4):
        nodes.start(node)
    nodes.wait()
    first, *others = (nodes.ended[node] for node in range(4))
    assert [rendezvous.poll_failure() for rendezvous in (first, *others)] == [None] * 4
    others[0].close(None)  # without a failure
    others[1].close("rank 5 was ended by SIGKILL; out of memory?")
    words = "node 2 ended: rank 5 was ended by SIGKILL; out of memory?"

    def news(rendezvous):
        while (found := rendezvous.poll_failure()) is None:
            pass
        return found

    assert news(first) == words
    first.close(words)
    assert news(others[2]) == words
    others[2].close(words)


def test_a_killed_launcher_is_noticed(tmp_path):
    nodes = Nodes(2, tmp_path)
    nodes.start(0)
    nodes.start(1)
    nodes.wait()
    nodes.ended[1].peers[0].close()  # as the kernel does
    while (found := nodes.ended[0].poll_failure()) is None:
        pass
    assert found == "node 1 ended: its launcher is gone (killed, or the machine is down)"
    nodes.close()


def met(save: Path, count: int) -> list[Rendezvous]:
    nodes = Nodes(count, save)
    for node in range(count):
        nodes.start(node)
    nodes.wait()
    return [nodes.ended[node] for node in range(count)]


@pytest.mark.parametrize("is_user_error", [False, True])
def test_the_first_failure_is_reported_unless_a_user_error_explains_it(tmp_path, is_user_error):
    first, second, third = met(tmp_path / "save", 3)

    def recorded(words):
        file = tmp_path / "elsewhere.json"
        while not file.exists() or words not in file.read_text():
            first.record_failure(tmp_path)
        return json.loads(file.read_text())

    second.peers[0].send(failed="rank 1 was ended by SIGKILL")
    reason = recorded("SIGKILL")
    assert reason["can_restart"] and not reason["is_user_error"]
    third.close("a.json, record 3: no such file" if is_user_error else "rank 2: connection closed", is_user_error)
    reason = recorded('"can_restart": false')
    words = "2 ended: a.json, record 3: no such file" if is_user_error else "1 ended: rank 1 was ended by SIGKILL"
    assert (reason["message"], reason["is_user_error"]) == (f"node {words}", is_user_error)
    for rendezvous in (first, second):
        rendezvous.close(None)


def test_the_reason_why_a_node_does_not_restart_is_reported(tmp_path):
    first, second = met(tmp_path, 2)
    second.close("a.json, record 3: no such file", is_user_error=True)
    with pytest.raises(RendezvousError, match=r"^node 1 ended: a\.json, record 3: no such file$"):
        first.regroup("rank 0: connection closed by peer", 6000)
    assert first.is_user_error
    first.close(None)


def test_a_node_that_was_told_to_start_learns_why_not(tmp_path, monkeypatch):
    """The last node leaves after another was told to start."""
    real, started = Peer.send, []

    def send(peer, **message):
        if "go" in message:
            started.append(peer)
            if len(started) == 2:
                raise PeerLost("gone")
        real(peer, **message)

    monkeypatch.setattr(Peer, "send", send)
    nodes = Nodes(3, tmp_path)
    for node in range(3):
        nodes.start(node)
    nodes.wait()
    [going] = [ended for ended in nodes.ended.values() if isinstance(ended, Rendezvous)]
    while (found := going.poll_failure()) is None:
        pass
    last = 3 - going.params.node_rank
    assert found == f"node {last} has left before the run started: gone"


def test_the_interface_of_a_local_address_is_found(monkeypatch):
    loopback = {info.address: name for name, all_of_it in psutil.net_if_addrs().items() for info in all_of_it}[
        "127.0.0.1"
    ]
    assert interface_of("127.0.0.1") == interface_of("localhost") == loopback
    with pytest.raises(
        SettingError, match=rf"no network interface of this machine has that address; there are .*{loopback} 127"
    ):
        interface_of("192.0.2.1")
    with pytest.raises(SettingError, match="no host of that name"):
        interface_of("no.such.machine.invalid")


# -- what must agree -------------------------------------------------------------------------------


def test_names_of_nodes():
    assert [node_names(numbers) for numbers in ([1], [3, 1], [0, 1, 2, 5, 7, 8])] == [
        "node 1",
        "nodes 1, 3",
        "nodes 0 to 2, 5, 7 to 8",
    ]


@pytest.fixture
def recipe(tmp_path):
    for name, text in {
        "m/config.json": "{}",
        "m/w.safetensors": "w" * 200_000,
        "a.json": "[1]",
        "b.json": "[2]",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "dcp/release").mkdir(parents=True)
    (tmp_path / "dcp/release/__0_0.distcp").write_text("x")
    (tmp_path / "dcp/latest_checkpointed_iteration.txt").write_text("release")
    overrides = {
        "data.dataset_param.basic_parameters.dataset": f"{tmp_path}/a.json, {tmp_path}/b.json",
        "model.model_name_or_path": tmp_path / "m",
        "training.load": tmp_path / "dcp",
        "training.train_iters": 1,
        "training.save": tmp_path / "save",
    }
    return lambda *more: load_settings(ROOT / "configs/tiny.yaml", [*(f"{k}={v}" for k, v in overrides.items()), *more])


def test_settings_and_variables_of_one_node_may_differ(recipe):
    environment = {"HCCL_BUFFSIZE": "200", "PATH": "/bin"}
    cache = "data.dataset_param.basic_parameters.cache_dir=/tmp/other"
    found = facts(recipe(), 8, environment)
    own = {"HCCL_IF_IP": "10.0.0.2", "HCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1", "PATH": "/usr/bin"}
    assert not disagreements({0: found, 1: facts(recipe(cache), 8, environment | own)})
    assert {found["NPUS_PER_NODE"], found["HCCL_BUFFSIZE"]} == {"8", "200"}
    assert re.fullmatch(r"2\.\d+\.\d+", found["torch"]) and found["CANN"] == "none"


def change(name: str, text: str, at: int) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = (folder / name).read_text()
        (folder / name).write_text(content[:at] + text + content[at + len(text) :])

    return act


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (change("b.json", "3", 1), "b.json"),
        (change("m/config.json", "[]", 0), "m/config.json"),
        (change("m/w.safetensors", "v", 0), "m/w.safetensors"),
        (change("m/w.safetensors", "v", 199_999), "m/w.safetensors"),
        (change("dcp/release/__0_0.distcp", "y", 0), "dcp/release/__0_0.distcp"),
        (lambda folder: (folder / "a.json").unlink(), "a.json"),
        (lambda folder: (folder / "dcp/latest_checkpointed_iteration.txt").write_text("2"), "dcp/release/"),
    ],
)
def test_a_different_file_is_found(recipe, tmp_path, act, named):
    before = facts(recipe(), 8, {})
    act(tmp_path)
    found = disagreements({0: before, 1: facts(recipe(), 8, {})})
    assert any(f"node 1 has {tmp_path}/{named}: " in difference.line for difference in found), found


@pytest.mark.parametrize(
    ("settings", "processes", "environment", "named"),
    [
        ("training.lr=0.5", 8, {}, "node 1 has training.lr: 0.5; node 0: 0.0"),
        ("training.seed=1", 4, {}, "node 1 has NPUS_PER_NODE: 4; node 0: 8"),
        (
            "training.seed=1",
            8,
            {"HCCL_DETERMINISTIC": "true"},
            "node 1 has HCCL_DETERMINISTIC: true; node 0: none",
        ),
        ("training.seed=1", 8, {"ASCEND_HOME_PATH": "cann"}, "node 1 has CANN: 8.5.0; node 0: none"),
    ],
)
def test_a_different_setting_is_found(recipe, tmp_path, monkeypatch, settings, processes, environment, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cann/runtime").mkdir(parents=True)
    (tmp_path / "cann/runtime/version.info").write_text("Version=8.5.0\n")
    found = disagreements({0: facts(recipe(), 8, {}), 1: facts(recipe(settings), processes, environment)})
    assert any(difference.line.startswith(named) for difference in found), found


def test_different_code_is_found(tmp_path):
    from qwen35.launch.consistency import sources

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/a.py").write_text("1")
    before = sources(tmp_path)
    (tmp_path / "kernels/a.py").write_text("2")
    assert sources(tmp_path) != before
