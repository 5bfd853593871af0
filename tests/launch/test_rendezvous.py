"""The rendezvous of launchers: threads instead of nodes, real sockets, no torch."""

import contextlib
import json
import logging
import re
import socket
import threading
from dataclasses import replace

import psutil
import pytest
from ports import free_port

from qwen35.config.load import SettingError
from qwen35.launch.connection import Peer, PeerLost, authenticate
from qwen35.launch.rendezvous import Rendezvous, RendezvousError, RendezvousParameters, join
from qwen35.log import logger
from qwen35.network import interface_of
from qwen35.tools.address import listen
from qwen35.wording import named

SECRET = "a secret of the tests"


class Nodes:
    """Each joins the rendezvous in a thread of its own; keeps what each logged and how it ended."""

    def __init__(self, count: int, timeout: float = 60):
        self.params = RendezvousParameters(0, count, "127.0.0.1", free_port(), timeout, "torch 2.7.1", SECRET)
        self.logged: dict[int, list[str]] = {node: [] for node in range(count)}
        self.ended: dict[int, Rendezvous | str] = {}
        self.threads: list[threading.Thread] = []
        handler = logging.Handler()
        handler.emit = self.keep
        logger.handlers = [handler]
        logger.setLevel("INFO")

    def keep(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if found := re.match(r"node (\d+)", line):
            self.logged[int(found[1])].append(line)

    def start(self, node: int, **changes) -> None:
        params = replace(self.params, node_rank=node, **changes)

        def run():
            try:
                self.ended[node] = join(params)
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
    assert authenticate(peer, SECRET if nodes.params.secret else "", node, nodes.params.nnodes, nodes.params.must_agree)
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
def test_nodes_that_agree_start_and_the_port_is_free(order):
    nodes = Nodes(3)
    for node in order:
        nodes.start(node)
    nodes.wait()
    nodes.assert_joined()
    listen(nodes.params.port).close()  # while the nodes are still connected
    assert all("up to 60 s more" in line for logged in nodes.logged.values() for line in logged)
    nodes.close()


def test_missing_nodes_are_logged_and_named_in_the_error():
    nodes = Nodes(4, timeout=2)
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


def test_a_missing_node_0_is_named_with_its_address():
    nodes = Nodes(2, timeout=0.3)
    nodes.start(1)
    nodes.wait()
    where = f"node 0 at 127.0.0.1:{nodes.params.port}"
    assert nodes.ended[1].startswith(f"{where} did not answer within 0 s: Connection refused")
    assert nodes.logged[1][0].startswith(f"node 1: waiting for {where} (Connection refused), up to 0 s more")


def test_another_program_at_the_port_is_recognised():
    nodes = Nodes(2, timeout=0.5)
    with socket.create_server(("127.0.0.1", nodes.params.port)) as server:
        nodes.start(1)
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-OpenSSH\r\n")
        connection.close()
        server.close()
        nodes.wait()
    assert "what answers there is not a launcher" in "\n".join(nodes.logged[1])


def test_a_stranger_is_logged_and_does_no_harm():
    nodes = Nodes(2)
    nodes.start(0)
    with at_the_port(nodes) as connection:
        connection.sendall(b'GET / HTTP/1.0\r\n[[[[\n{"node_rank": "x"}\n')
        connection.recv(100)
        nodes.start(1)
        nodes.wait()
    nodes.assert_joined()
    assert any("a connection from 127.0.0.1 is not a launcher" in line for line in nodes.logged[0])
    nodes.close()


def test_a_node_that_leaves_may_come_again():
    nodes = Nodes(3)
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
        (1, {"must_agree": "torch 2.8"}, "node 1 (127.0.0.1) has torch 2.8; node 0: torch 2.7.1"),
    ],
)
def test_nodes_whose_numbers_contradict_end_all(node, changes, message_of_all):
    nodes = Nodes(3)
    nodes.start(0)
    with at_the_port(nodes) as connection:
        peer = authenticated(connection, nodes, 2)
        nodes.start(node, **changes)
        nodes.wait()
        while "error" not in (message := peer.receive(20)):
            pass
    assert [nodes.ended[0], nodes.ended[node], message["error"]] == [message_of_all] * 3


def test_all_nodes_learn_how_one_ends():
    nodes = Nodes(4)
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


def test_a_killed_launcher_is_noticed():
    nodes = Nodes(2)
    nodes.start(0)
    nodes.start(1)
    nodes.wait()
    nodes.ended[1].peers[0].close()  # as the kernel does
    while (found := nodes.ended[0].poll_failure()) is None:
        pass
    assert found == "node 1 ended: its launcher is gone (killed, or the machine is down)"
    nodes.close()


def met(count: int) -> list[Rendezvous]:
    nodes = Nodes(count)
    for node in range(count):
        nodes.start(node)
    nodes.wait()
    return [nodes.ended[node] for node in range(count)]


@pytest.mark.parametrize("is_user_error", [False, True])
def test_the_first_failure_is_reported_unless_a_user_error_explains_it(tmp_path, is_user_error):
    first, second, third = met(3)

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


def test_the_reason_why_a_node_does_not_restart_is_reported():
    first, second = met(2)
    second.close("a.json, record 3: no such file", is_user_error=True)
    with pytest.raises(RendezvousError, match=r"^node 1 ended: a\.json, record 3: no such file$"):
        first.regroup("rank 0: connection closed by peer", lambda: 6000)
    assert first.is_user_error
    first.close(None)


def test_a_node_that_has_stopped_waits_for_node_0(monkeypatch):
    """Node 0 may still draw the curve; a scheduler would kill it for another node's exit code."""
    first, second = met(2)
    ended = threading.Event()

    def close():
        second.close(None, has_stopped=True)
        ended.set()

    thread = threading.Thread(target=close)
    thread.start()
    while (found := first.poll_failure()) is None and first.peers:
        pass
    assert not found and not ended.wait(0.3)
    first.close(None, has_stopped=True)
    thread.join(60)
    assert ended.is_set()


def test_a_node_that_was_told_to_start_learns_why_not(monkeypatch):
    """The last node leaves after another was told to start."""
    real, started = Peer.send, []

    def send(peer, **message):
        if "go" in message:
            started.append(peer)
            if len(started) == 2:
                raise PeerLost("gone")
        real(peer, **message)

    monkeypatch.setattr(Peer, "send", send)
    nodes = Nodes(3)
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


def test_named_numbers():
    assert [named("node", numbers) for numbers in ([1], [3, 1], [0, 1, 2, 5, 7, 8])] == [
        "node 1",
        "nodes 1, 3",
        "nodes 0 to 2, 5, 7 to 8",
    ]
