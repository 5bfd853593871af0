"""What reaches MASTER_PORT while machines meet, and is no launcher of theirs: real sockets, attacks, and false answers."""

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
from test_rendezvous import SECRET, Machines, at_the_port, introduced

from qwen35.config.load import SettingError
from qwen35.errors import UserError, one_line
from qwen35.launch import handshake
from qwen35.launch.connection import Left, Peer
from qwen35.launch.consistency import OTHER, hashed
from qwen35.launch.handshake import Hello, check_secret, proof, read_hello
from qwen35.launch.nodes import foreign
from qwen35.launch.rendezvous import UNSAID, Meeting

GREETING = rb'\{"greeting": "qwen35 launcher", "challenge": "[0-9a-f]{32}"\}\n'
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\nerror: forged"


def hello(challenge: str, secret: str, machine: object, machines: object) -> bytes:
    """A hello with the proof that belongs to its words, whatever they are."""
    words = {"machine": machine, "machines": machines, "challenge": "own"}
    answer = proof(secret, "join", challenge, machine, machines, "own")  # type: ignore[arg-type]
    return json.dumps({**words, "proof": answer}).encode() + b"\n"


ATTACKS = {
    "garbage": lambda challenge: bytes(range(256)) * 8 + b"\n",
    "a web browser": lambda challenge: b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a huge line": lambda challenge: b'{"machine": "' + b"x" * 10_000_000,
    "a huge number": lambda challenge: b'{"machine": ' + b"9" * 4000 + b"}\n",
    "deep": lambda challenge: b"[" * 4000 + b"\n",
    "no object": lambda challenge: b"[1, 2]\n",
    "not a number": lambda challenge: b'{"machine": NaN, "machines": Infinity}\n',
    "a false node": lambda challenge: b'{"machine": 1, "machines": 3}\n',
    "a false node that ends it": lambda challenge: b'{"machine": 1, "machines": 2, "error": "x", "ended": "y"}\n',
    "facts": lambda challenge: b'{"facts": {}}\n' * 100,
    "no secret": lambda challenge: hello(challenge, "", 1, 2),
    "another secret": lambda challenge: hello(challenge, SECRET + "!", 1, 2),
    "another challenge": lambda challenge: hello("0" * 32, SECRET, 1, 2),
    "machine -5": lambda challenge: hello(challenge, SECRET, -5, 2),
    "machine 7 of 2": lambda challenge: hello(challenge, SECRET, 7, 2),
    "machine true": lambda challenge: hello(challenge, SECRET, True, 2),
    "machine 1.0": lambda challenge: hello(challenge, SECRET, 1.0, 2),
    "machine '1'": lambda challenge: hello(challenge, SECRET, "1", 2),
    "escapes": lambda challenge: json.dumps({"machine": ESCAPE, "proof": "\ud800"}).encode() + b"\n",
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
def test_a_stranger_learns_nothing_and_changes_nothing(tmp_path, attack):
    those = Machines(2, tmp_path)
    those.start(0)
    with at_the_port(those) as connection:
        greeting = connection.recv(1 << 16)
        assert re.fullmatch(GREETING, greeting)
        with contextlib.suppress(ConnectionError):  # it does not listen to all of it
            connection.sendall(attack(json.loads(greeting)["challenge"]))
        assert received(connection) == b""
        those.start(1)
        those.wait()
    assert all(isinstance(end, Meeting) for end in those.ended.values()), those.ended
    told = [line for line in those.said[0] if "waiting for" not in line]
    who = "somebody at 127.0.0.1 connects and is no launcher of this run, or has another RENDEZVOUS_SECRET"
    assert told == [f"machine 0, port {those.place.port}: {who}"]
    those.close()


@pytest.mark.parametrize("many", [20, 3 * handshake.MOST])
def test_who_connects_and_says_nothing_holds_up_nobody(tmp_path, monkeypatch, many):
    """Nor who has closed its half of the connection, or says a byte now and then; though they might take for ever."""
    monkeypatch.setattr(handshake, "HELLO", 600.0)
    those = Machines(2, tmp_path)
    those.start(0)
    with contextlib.ExitStack() as opened:
        idle = [opened.enter_context(at_the_port(those)) for _ in range(many)]
        for connection in idle[::3]:
            with contextlib.suppress(OSError):
                connection.sendall(b"{")
                connection.shutdown(socket.SHUT_WR)
        those.start(1)
        those.wait()
        assert all(isinstance(end, Meeting) for end in those.ended.values()), those.ended
        for connection in idle:
            assert re.fullmatch(GREETING, received(connection))
    those.close()


def test_a_stranger_has_its_time(tmp_path, monkeypatch):
    """However it drips; at the end of it the connection is closed."""
    monkeypatch.setattr(handshake, "HELLO", 0.5)
    those = Machines(2, tmp_path)
    those.start(0)
    with at_the_port(those) as idle, at_the_port(those) as dripping:
        end = time.monotonic() + 300
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                dripping.sendall(b" ")
                time.sleep(0.01)
        assert time.monotonic() < end
        assert re.fullmatch(GREETING, received(idle))
    those.start(1)
    those.wait()
    assert all(isinstance(end, Meeting) for end in those.ended.values()), those.ended
    those.close()


def test_what_was_heard_once_is_no_proof(tmp_path, monkeypatch):
    """A hello that was right for one connection is wrong for the next."""
    monkeypatch.setattr(handshake, "HELLO", 600.0)
    those = Machines(3, tmp_path)
    those.start(0)
    with at_the_port(those) as first, at_the_port(those) as second:
        right = hello(json.loads(first.recv(1 << 16))["challenge"], SECRET, 1, 3)
        second.recv(1 << 16)
        second.sendall(right)
        assert received(second) == b""
        first.sendall(right)
        assert Peer(first, "").hear(30).keys() == {"proof"}
    those.start(1)
    those.start(2)
    those.wait()
    assert all(isinstance(end, Meeting) for end in those.ended.values()), those.ended
    those.close()


FACTS = {"torch": "2.7.1", "training.lr": "1e-05", "/data/private.json": "10 bytes (aa)"}


def test_without_a_secret_a_false_node_is_told_nothing_of_the_run(tmp_path):
    """It knows the protocol, and that ends the start; what differs is said on machine 0 alone."""
    those = Machines(2, tmp_path)
    those.place = replace(those.place, secret="")
    those.start(0, FACTS)
    with at_the_port(those) as connection:
        peer = introduced(connection, those, 1)
        heard = []
        while not heard or "error" not in heard[-1]:
            heard.append(peer.hear(30))
            if "look" in heard[-1]:
                peer.tell(time=time.time(), facts={}, seen=True)
    those.wait()
    assert heard[0].keys() == {"look", "salt"} and re.fullmatch(r"\.seen-[0-9a-f]{16}", heard[0]["look"])
    assert heard[1:] == [{"lines": []}, {"error": UNSAID, "ended": UNSAID}]
    assert those.ended[0] == "the machines differ in 3 things, told above: nothing was started"
    assert "machine 1 has training.lr: none; machine 0: 1e-05" in those.said[0]


def test_without_a_secret_machines_compare_hashes(tmp_path):
    those = Machines(3, tmp_path)
    those.place = replace(those.place, secret="")
    those.start(0, FACTS)
    those.start(1, FACTS)
    those.start(2, {"torch": "2.7.1", "training.lr": "0.5", "/other/private.json": "1"})
    those.wait()
    assert [line for line in those.said[0] if "waiting" not in line] == [
        f"machine 2 has training.lr: {OTHER}; machine 0: 1e-05",
        "machine 2 has /data/private.json: none; machine 0: 10 bytes (aa)",
        "machine 2 has what machine 0 has not: 1 things; machine 0: none",
    ]
    assert (those.ended[1], those.ended[2]) == (UNSAID, UNSAID)
    assert not [line for n in (1, 2) for line in those.said[n] if "waiting" not in line]
    agreeing = Machines(2, tmp_path)
    agreeing.place = replace(agreeing.place, secret="")
    for machine in range(2):
        agreeing.start(machine, FACTS)
    agreeing.wait()
    assert all(isinstance(end, Meeting) for end in agreeing.ended.values()), agreeing.ended
    agreeing.close()


@pytest.mark.parametrize(
    "changed",
    [
        *({"time": value} for value in ("x", None, [], True, {}, 3)),
        *({"facts": value} for value in ("x", None, [], 3)),
        *({"seen": value} for value in ("x", None, 1)),
        {"error": ESCAPE},
        {"facts": {"torch": ESCAPE}},
        {"facts": {ESCAPE: {"a": [1]}}},
        None,
    ],
)
def test_answers_that_make_no_sense_are_one_line(tmp_path, changed):
    """Of a machine that knows the secret."""
    those = Machines(2, tmp_path)
    those.start(0)
    with at_the_port(those) as connection:
        peer = introduced(connection, those, 1)
        while "error" not in (heard := peer.hear(30)):
            if "look" not in heard:
                continue
            if changed is None:
                connection.sendall(b"\xff\n")
            else:
                peer.tell(**{"time": time.time(), "facts": {"torch": "2.7.1"}, "seen": True, **changed})
    those.wait()
    assert isinstance(those.ended[0], str) and ("machine 1" in those.ended[0] or "differ" in those.ended[0])
    assert all(line.isprintable() for line in (*those.said[0], those.ended[0]))


def test_a_clock_that_is_no_number(tmp_path):
    for words in ("NaN", "1e999", "-1e999"):
        those = Machines(2, tmp_path)
        those.start(0)
        those.start(1, talk={"clock": lambda words=words: float(words.replace("1e999", "inf"))})
        those.wait()
        assert all(isinstance(end, Meeting) for end in those.ended.values()), those.ended
        assert any("the clock of machine 1 is" in line for line in those.said[0])
        those.close()


def false_master(those: Machines, act) -> list[bytes]:
    """Somebody else listens at the port of machine 0; what machine 1 says to it, connection by connection."""
    heard = []
    with socket.create_server(("127.0.0.1", those.place.port)) as server:
        those.start(1, FACTS)
        server.settimeout(0.2)
        while those.threads[0].is_alive():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(30)
                    heard.append(act(connection))
    those.wait()
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
def test_a_false_machine_0_is_told_nothing_and_ends_nothing(tmp_path, answers):
    those = Machines(2, tmp_path, timeout=2)
    heard = false_master(those, lambda connection: greet(connection, *answers))
    assert heard
    for said in heard:
        message = json.loads(said)  # one line, and nothing more
        assert message.keys() == {"machine", "machines", "challenge", "proof"}
    assert "did not answer within 2 s: something answers there that is no launcher of this run" in those.ended[1]


@pytest.mark.parametrize(
    "greeting",
    [b"\xff\xfe\n", b"[]\n", b'{"greeting": "qwen35 launcher"}\n', b'{"greeting": "qwen35 launcher", "challenge": 3}\n',
     b"x" * 100_000, b"", b'{"greeting": 7, "challenge": "x"}\n'],
)  # fmt: skip
def test_a_greeting_that_is_none_is_not_answered(tmp_path, greeting):
    def act(connection: socket.socket) -> bytes:
        connection.sendall(greeting)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(1 << 16)
        return b""

    those = Machines(2, tmp_path, timeout=1)
    assert set(false_master(those, act)) == {b""}
    assert "something answers there that is no launcher of this run" in those.ended[1]


def test_without_a_secret_a_false_machine_0_gets_hashes(tmp_path):
    those = Machines(2, tmp_path)
    those.place = replace(those.place, secret="")
    with socket.create_server(("127.0.0.1", those.place.port)) as server:
        those.start(1, FACTS)
        peer = Peer(server.accept()[0], "")
        peer.tell(greeting="qwen35 launcher", challenge="x")
        said = peer.hear(30)
        peer.tell(proof=proof("", "host", said["challenge"], "x"))
        peer.tell(look="../x", salt="salt", lines=[ESCAPE, 3], waiting=ESCAPE)
        answer = peer.hear(30)
        assert (answer.pop("facts"), answer.pop("seen")) == (hashed(FACTS, "salt"), False)
        assert answer.keys() == {"time"}
        peer.tell(lines="abc", error=ESCAPE)
    those.wait()
    assert those.ended[1].isprintable() and all(line.isprintable() for line in those.said[1])
    assert "\\x1b]0;owned" in those.ended[1]


def test_what_a_machine_cannot_read_is_no_news_for_a_false_machine_0(tmp_path):
    def unreadable():
        raise PermissionError(13, "Permission denied", "/data/private.json")

    those = Machines(2, tmp_path)
    those.place = replace(those.place, secret="")
    those.start(0)
    those.start(1, unreadable)
    those.wait()
    assert those.ended[1] == "/data/private.json: Permission denied"
    assert those.ended[0].startswith("machine 1 has left while the machines met")


def test_a_machine_with_another_secret_is_named_on_both(tmp_path):
    those = Machines(2, tmp_path, timeout=4)
    those.start(0)
    with at_the_port(those):
        those.start(1, secret="another one", timeout=1)
    those.wait()
    assert "machine 1 of 2 did not come to MASTER_PORT" in those.ended[0]
    assert any("or has another RENDEZVOUS_SECRET" in line for line in those.said[0])
    assert "or has another RENDEZVOUS_SECRET" in those.ended[1]
    assert SECRET not in repr((those.place, those.said, those.ended))


def test_a_secret_that_can_be_guessed_is_refused():
    with pytest.raises(SettingError) as caught:
        check_secret("guessme")
    assert "RENDEZVOUS_SECRET has fewer than 16 characters" in str(caught.value) and "guessme" not in str(caught.value)
    assert check_secret("") == "" and check_secret("x" * 16) == "x" * 16


SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_an_error_is_a_line_that_no_terminal_obeys():
    """Whatever file or machine its words come from."""
    assert (
        one_line(UserError("é\x1b[2J\u202e a.json\x9b,\n record\t3\r"))
        == "é\\x1b[2J\\u202e a.json\\x9b, record\\x093\\x0d"
    )
    assert one_line(FileNotFoundError(2, "No such file", "a\nerror: b\udcff")) == "a\\x0aerror: b\\udcff: No such file"
    assert len(foreign("x" * 5_000_000)) == 1000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("0a\u202e\ud800\n", max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)


@SLOW
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("machine", "machines", "challenge", "proof"), VALUES)))
def test_no_message_passes_for_a_hello(message):
    assert read_hello(message, "challenge", SECRET) is None


@SLOW
@given(VALUES, VALUES, VALUES)
def test_a_hello_with_its_proof_passes_if_it_makes_sense(machine, machines, challenge):
    try:
        answer = proof(SECRET, "join", "c", machine, machines, challenge)
    except ValueError:  # an integer that no JSON text holds
        return
    message = {"machine": machine, "machines": machines, "challenge": challenge, "proof": answer}
    is_right = type(machine) is int and type(machines) is int and 0 <= machine < machines and isinstance(challenge, str)
    assert read_hello(message, "c", SECRET) == (Hello(machine, machines, challenge) if is_right else None)


@SLOW
@given(st.binary(max_size=300) | VALUES.map(lambda value: json.dumps(value).encode() + b"\n"), st.integers(1, 400))
def test_any_bytes_are_a_message_or_none(content, most):
    ours, theirs = socket.socketpair()
    ours.sendall(content)
    ours.close()
    peer = object.__new__(Peer)
    peer.connection, peer.rest = theirs, b""
    try:
        with contextlib.suppress(Left):
            while isinstance(peer.hear(1, most), dict):
                pass
            raise AssertionError("a connection that is closed is at its end")
    finally:
        theirs.close()


def test_machines_may_meet_while_strangers_knock(tmp_path):
    """All the time, with everything above: the same end as without them."""
    those = Machines(4, tmp_path)
    is_over = threading.Event()

    def knock() -> None:
        while not is_over.is_set():
            for attack in ATTACKS.values():
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", those.place.port), timeout=1) as connection,
                ):
                    connection.sendall(attack("0" * 32)[:5000])

    knocking = [threading.Thread(target=knock) for _ in range(2)]
    for thread in knocking:
        thread.start()
    for machine in (2, 0, 3, 1):
        time.sleep(0.3)
        those.start(machine)
    those.wait()
    is_over.set()
    for thread in knocking:
        thread.join()
    assert all(isinstance(end, Meeting) for end in those.ended.values()), those.ended
    assert sum("somebody at" in line for line in those.said[0]) == 1
    those.close()
