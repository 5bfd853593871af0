"""What else may connect to MASTER_PORT during the rendezvous: attacks and false answers."""

import contextlib
import json
import re
import socket
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rendezvous import SECRET, Nodes, at_the_port, authenticated

from qwen35.config.load import SettingError
from qwen35.errors import UserError, one_line
from qwen35.launch import connection as handshake
from qwen35.launch.connection import Hello, Peer, PeerLost, check_secret, proof, read_hello
from qwen35.launch.rendezvous import WITHHELD, sanitized

GREETING = rb'\{"greeting": "qwen35 launcher", "challenge": "[0-9a-f]{32}"\}\n'
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\nerror: forged"


def hello(challenge: str, secret: str, node_rank: object, nnodes: object) -> bytes:
    """A hello of any values with a valid proof."""
    fields = {"node_rank": node_rank, "nnodes": nnodes, "must_agree": "torch 2.7.1", "challenge": "own"}
    answer = proof(secret, "join", challenge, *fields.values())  # type: ignore[arg-type]
    return json.dumps({**fields, "proof": answer}).encode() + b"\n"


ATTACKS = {
    "garbage": lambda challenge: bytes(range(256)) * 8 + b"\n",
    "a web browser": lambda challenge: b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a huge line": lambda challenge: b'{"node_rank": "' + b"x" * 10_000_000,
    "a huge number": lambda challenge: b'{"node_rank": ' + b"9" * 4000 + b"}\n",
    "deep": lambda challenge: b"[" * 4000 + b"\n",
    "no object": lambda challenge: b"[1, 2]\n",
    "not a number": lambda challenge: b'{"node_rank": NaN, "nnodes": Infinity}\n',
    "a false node": lambda challenge: b'{"node_rank": 1, "nnodes": 3}\n',
    "a false node that ends it": lambda challenge: b'{"node_rank": 1, "nnodes": 2, "error": "x", "ended": "y"}\n',
    "facts": lambda challenge: b'{"facts": {}}\n' * 100,
    "no secret": lambda challenge: hello(challenge, "", 1, 2),
    "another secret": lambda challenge: hello(challenge, SECRET + "!", 1, 2),
    "another challenge": lambda challenge: hello("0" * 32, SECRET, 1, 2),
    "node -5": lambda challenge: hello(challenge, SECRET, -5, 2),
    "node 7 of 2": lambda challenge: hello(challenge, SECRET, 7, 2),
    "node true": lambda challenge: hello(challenge, SECRET, True, 2),
    "node 1.0": lambda challenge: hello(challenge, SECRET, 1.0, 2),
    "node '1'": lambda challenge: hello(challenge, SECRET, "1", 2),
    "escapes": lambda challenge: json.dumps({"node_rank": ESCAPE, "proof": "\ud800"}).encode() + b"\n",
}


def received(connection: socket.socket) -> bytes:
    """All that comes until the other end closes it."""
    connection.settimeout(30)
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while more := connection.recv(1 << 16):
            found += more
    return found


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_stranger_learns_nothing_and_changes_nothing(attack):
    nodes = Nodes(2)
    nodes.start(0)
    with at_the_port(nodes) as connection:
        greeting = connection.recv(1 << 16)
        assert re.fullmatch(GREETING, greeting)
        with contextlib.suppress(ConnectionError):  # it does not listen to all of it
            connection.sendall(attack(json.loads(greeting)["challenge"]))
        assert received(connection) == b""
        nodes.start(1)
        nodes.wait()
    nodes.assert_joined()
    logged = [line for line in nodes.logged[0] if "waiting for" not in line]
    expected = "a connection from 127.0.0.1 is not a launcher of this run, or has another RENDEZVOUS_SECRET"
    assert logged == [f"node 0, port {nodes.params.port}: {expected}"]
    nodes.close()


@pytest.mark.parametrize("many", [20, 3 * handshake.MAX_PENDING])
def test_silent_connections_delay_nobody(monkeypatch, many):
    """Some have closed their half of the connection or sent one byte; none is at its deadline."""
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT", 600.0)
    nodes = Nodes(2)
    nodes.start(0)
    with contextlib.ExitStack() as opened:
        idle = [opened.enter_context(at_the_port(nodes)) for _ in range(many)]
        for connection in idle[::3]:
            with contextlib.suppress(OSError):
                connection.sendall(b"{")
                connection.shutdown(socket.SHUT_WR)
        nodes.start(1)
        nodes.wait()
        nodes.assert_joined()
        for connection in idle:
            assert re.fullmatch(GREETING, received(connection))
    nodes.close()


def test_a_stranger_is_disconnected_at_its_deadline(monkeypatch):
    """Bytes that drip in do not extend its time."""
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT", 0.5)
    nodes = Nodes(2)
    nodes.start(0)
    with at_the_port(nodes) as idle, at_the_port(nodes) as dripping:
        end = time.monotonic() + 300
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                dripping.sendall(b" ")
                time.sleep(0.01)
        assert time.monotonic() < end
        assert re.fullmatch(GREETING, received(idle))
    nodes.start(1)
    nodes.wait()
    nodes.assert_joined()
    nodes.close()


def test_a_proof_cannot_be_replayed(monkeypatch):
    """A hello that is valid for one connection is invalid for the next."""
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT", 600.0)
    nodes = Nodes(3)
    nodes.start(0)
    with at_the_port(nodes) as first, at_the_port(nodes) as second:
        right = hello(json.loads(first.recv(1 << 16))["challenge"], SECRET, 1, 3)
        second.recv(1 << 16)
        second.sendall(right)
        assert received(second) == b""
        first.sendall(right)
        assert Peer(first, "").receive(30).keys() == {"proof"}
    nodes.start(1)
    nodes.start(2)
    nodes.wait()
    nodes.assert_joined()
    nodes.close()


def test_without_a_secret_a_false_node_learns_nothing_of_the_run():
    """It knows the protocol, and takes a node's place: it hears only that there was an error."""
    nodes = Nodes(3)
    nodes.params = replace(nodes.params, secret="")
    nodes.start(0)
    with at_the_port(nodes) as connection:
        peer = authenticated(connection, nodes, 1)
        nodes.start(2, must_agree="torch 2.8")
        heard = []
        while not heard or "error" not in heard[-1]:
            heard.append(peer.receive(30))
    nodes.wait()
    assert all(message.keys() == {"waiting"} for message in heard[:-1])
    assert heard[-1] == {"error": WITHHELD, "ended": WITHHELD}
    assert nodes.ended == {0: "node 2 (127.0.0.1) has torch 2.8; node 0: torch 2.7.1", 2: WITHHELD}


def test_what_a_node_has_is_printed_without_control_characters():
    nodes = Nodes(2)
    nodes.start(0)
    nodes.start(1, must_agree=ESCAPE)
    nodes.wait()
    assert all(end.isprintable() and "\\x1b]0;owned" in end for end in nodes.ended.values())


def false_master(nodes: Nodes, act) -> list[bytes]:
    """Listen at the port of node 0 in its place. Returns what node 1 sent, by connection."""
    heard = []
    with socket.create_server(("127.0.0.1", nodes.params.port)) as server:
        nodes.start(1)
        server.settimeout(0.05)
        while nodes.threads[0].is_alive():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(30)
                    heard.append(act(connection))
    nodes.wait()
    return heard


def greet(connection: socket.socket, *answers: bytes) -> bytes:
    connection.sendall(b'{"greeting": "qwen35 launcher", "challenge": "%s"}\n' % (b"0" * 32))
    said = connection.recv(1 << 16)
    connection.settimeout(0.3)  # for what should not come
    for answer in answers:
        connection.sendall(answer)
    with contextlib.suppress(OSError):
        while more := connection.recv(1 << 16):
            said += more
    return said


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [b'{"look": "x"}\n'],
        [b'{"proof": "00"}\n', b'{"look": "x", "salt": "salt"}\n'],
        [b'{"proof": ["\\ud800"]}\n{"go": true}\n'],
        [b'{"error": "stop"}\n'],
        [b"x" * 100_000],
    ],
)
def test_a_false_node_0_learns_nothing_and_ends_nothing(answers):
    nodes = Nodes(2, timeout=0.4)
    heard = false_master(nodes, lambda connection: greet(connection, *answers))
    assert heard
    for said in heard:
        message = json.loads(said)  # one line, and nothing more
        assert message.keys() == {"node_rank", "nnodes", "must_agree", "challenge", "proof"}
    assert "did not answer within 0 s: what answers there is not a launcher of this run" in nodes.ended[1]


@pytest.mark.parametrize(
    "greeting",
    [b"\xff\xfe\n", b"[]\n", b'{"greeting": "qwen35 launcher"}\n', b'{"greeting": "qwen35 launcher", "challenge": 3}\n',
     b"x" * 100_000, b"", b'{"greeting": 7, "challenge": "x"}\n'],
)  # fmt: skip
def test_an_invalid_greeting_is_not_answered(greeting):
    def act(connection: socket.socket) -> bytes:
        with contextlib.suppress(OSError):  # it does not listen to all of it
            connection.sendall(greeting)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1 << 16)
        return b""

    nodes = Nodes(2, timeout=0.2)
    assert set(false_master(nodes, act)) == {b""}
    assert "what answers there is not a launcher of this run" in nodes.ended[1]


def test_what_a_false_node_0_says_is_printed_without_control_characters():
    nodes = Nodes(2)
    nodes.params = replace(nodes.params, secret="")
    with socket.create_server(("127.0.0.1", nodes.params.port)) as server:
        nodes.start(1)
        peer = Peer(server.accept()[0], "")
        peer.send(greeting="qwen35 launcher", challenge="x")
        said = peer.receive(30)
        peer.send(proof=proof("", "host", said["challenge"], "x"))
        peer.send(lines=[ESCAPE, 3], waiting=ESCAPE)
        peer.send(error=ESCAPE)
    nodes.wait()
    assert nodes.ended[1].isprintable() and all(line.isprintable() for line in nodes.logged[1])
    assert "\\x1b]0;owned" in nodes.ended[1]


def test_another_secret_is_named_on_both_nodes():
    nodes = Nodes(2, timeout=2)
    nodes.start(0)
    with at_the_port(nodes):
        nodes.start(1, secret="another one", timeout=0.3)
    nodes.wait()
    assert "node 1 of 2 did not connect to MASTER_PORT" in nodes.ended[0]
    assert any("or has another RENDEZVOUS_SECRET" in line for line in nodes.logged[0])
    assert "or has another RENDEZVOUS_SECRET" in nodes.ended[1]
    assert SECRET not in repr((nodes.params, nodes.logged, nodes.ended))


def test_a_secret_that_can_be_guessed_is_refused():
    with pytest.raises(SettingError) as caught:
        check_secret("guessme")
    assert "RENDEZVOUS_SECRET has fewer than 16 characters" in str(caught.value) and "guessme" not in str(caught.value)
    assert check_secret("") == "" and check_secret("x" * 16) == "x" * 16


SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_an_error_is_one_line_without_control_characters():
    """Whatever file or node its text comes from."""
    assert (
        one_line(UserError("é\x1b[2J\u202e a.json\x9b,\n record\t3\r"))
        == "é\\x1b[2J\\u202e a.json\\x9b, record\\x093\\x0d"
    )
    assert one_line(FileNotFoundError(2, "No such file", "a\nerror: b\udcff")) == "a\\x0aerror: b\\udcff: No such file"
    assert len(sanitized("x" * 5_000_000)) == 1000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("0a\u202e\ud800\n", max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)


@SLOW
@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("node_rank", "nnodes", "must_agree", "challenge", "proof"), VALUES)
    )
)
def test_no_message_without_a_proof_passes_for_a_hello(message):
    assert read_hello(message, "challenge", SECRET) is None


@SLOW
@given(VALUES, VALUES, VALUES)
def test_a_hello_with_a_valid_proof_passes_if_its_values_are_valid(node_rank, nnodes, challenge):
    try:
        answer = proof(SECRET, "join", "c", node_rank, nnodes, "torch", challenge)
    except ValueError:  # an integer that no JSON text holds
        return
    message = {"node_rank": node_rank, "nnodes": nnodes, "must_agree": "torch", "challenge": challenge, "proof": answer}
    is_rank = type(node_rank) is int and type(nnodes) is int and 0 <= node_rank < nnodes
    is_valid = is_rank and isinstance(challenge, str)
    assert read_hello(message, "c", SECRET) == (Hello(node_rank, nnodes, "torch", challenge) if is_valid else None)


@SLOW
@given(st.binary(max_size=300) | VALUES.map(lambda value: json.dumps(value).encode() + b"\n"), st.integers(1, 400))
def test_any_bytes_are_a_message_or_none(content, max_bytes):
    ours, theirs = socket.socketpair()
    ours.sendall(content)
    ours.close()
    peer = object.__new__(Peer)
    peer.connection, peer.buffer = theirs, b""
    try:
        with contextlib.suppress(PeerLost):
            while isinstance(peer.receive(1, max_bytes), dict):
                pass
            raise AssertionError("a closed connection has an end")
    finally:
        theirs.close()


def test_nodes_may_join_while_strangers_connect():
    """All attacks of above, all the time, change nothing."""
    nodes = Nodes(4)
    is_over = threading.Event()

    def connect_all() -> None:
        while not is_over.is_set():
            for attack in ATTACKS.values():
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", nodes.params.port), timeout=1) as connection,
                ):
                    connection.sendall(attack("0" * 32)[:5000])

    strangers = [threading.Thread(target=connect_all) for _ in range(2)]
    for thread in strangers:
        thread.start()
    for node in (2, 0, 3, 1):
        time.sleep(0.1)
        nodes.start(node)
    nodes.wait()
    is_over.set()
    for thread in strangers:
        thread.join()
    nodes.assert_joined()
    assert sum("a connection from" in line for line in nodes.logged[0]) == 1
    nodes.close()
