"""Launchers that meet: threads in the place of machines, real sockets, no torch."""

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
from qwen35.launch.connection import Left, Peer
from qwen35.launch.consistency import disagreements, facts, machines, present, seen
from qwen35.launch.handshake import introduce
from qwen35.launch.rendezvous import Meeting, MeetingError, Place, Talk, listen, meet
from qwen35.network import interface_of

ROOT = Path(__file__).parents[2]
SECRET = "a secret of the tests"


class Machines:
    """Each meets the others in a thread of its own; what it said, and how that ended, is kept."""

    def __init__(self, count: int, save: Path, timeout: float = 60):
        self.place = Place(0, count, "127.0.0.1", free_port(), timeout, SECRET)
        self.save = save
        self.said: dict[int, list[str]] = {}
        self.ended: dict[int, Meeting | str] = {}
        self.threads: list[threading.Thread] = []

    def start(self, machine: int, own: Mapping[str, str] | Callable = {"torch": "2.7.1"}, **changes) -> None:  # noqa: B006
        said = self.said.setdefault(machine, [])
        called = own if callable(own) else lambda: own
        talk = replace(Talk(called, self.save, said.append, patience=0.2), **changes.pop("talk", {}))
        place = replace(self.place, machine=machine, **changes)

        def run():
            try:
                self.ended[machine] = meet(place, talk)
            except MeetingError as error:
                self.ended[machine] = str(error)

        thread = threading.Thread(target=run)
        thread.start()
        self.threads.append(thread)

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()

    def close(self) -> None:
        for meeting in self.ended.values():
            if isinstance(meeting, Meeting):
                meeting.close(None)


def introduced(connection: socket.socket, those: Machines, machine: int) -> Peer:
    peer = Peer(connection, "")
    assert introduce(peer, replace(those.place, machine=machine))
    return peer


@contextlib.contextmanager
def at_the_port(machines: Machines):
    """Machine 0 listens by now: nothing is to be waited for."""
    connection = None
    while connection is None:
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", machines.place.port))
    with connection:
        yield connection


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_machines_that_agree_go_on_and_the_port_is_free(tmp_path, order):
    all_of_them = Machines(3, tmp_path / "runs" / "new")
    for machine in order:
        all_of_them.start(machine)
    all_of_them.wait()
    assert all(isinstance(end, Meeting) for end in all_of_them.ended.values()), all_of_them.ended
    assert not list(tmp_path.iterdir())  # the folder was made for the occasion
    listen(all_of_them.place.port).close()  # while the machines are still connected
    assert all("up to 60 s more" in line for said in all_of_them.said.values() for line in said)
    all_of_them.close()


def test_who_is_waited_for_is_said_and_named_at_the_end(tmp_path):
    those = Machines(4, tmp_path, timeout=2)
    those.start(0)
    those.start(2)
    those.wait()
    expected = (
        f"machines 1, 3 of 4 did not come to MASTER_PORT={those.place.port} of machine 0 within 2 s: was the run"
        " started there, with NODES=4, a NODE_RANK of its own and this machine's MASTER_ADDR?"
    )
    assert those.ended == {0: expected, 2: expected}
    assert those.said[0][0].startswith(
        f"machine 0: waiting for machines 1 to 3 of 4 (port {those.place.port}), up to 2 s"
    )
    assert "machine 2: waiting for machines 1, 3 of 4" in "\n".join(those.said[2])


def test_a_machine_0_that_never_comes(tmp_path):
    those = Machines(2, tmp_path, timeout=1)
    those.start(1)
    those.wait()
    where = f"machine 0 at 127.0.0.1:{those.place.port}"
    assert those.ended[1].startswith(f"{where} did not answer within 1 s: Connection refused")
    assert those.said[1][0].startswith(f"machine 1: waiting for {where} (Connection refused), up to 1 s more")


def test_something_else_at_the_port(tmp_path):
    those = Machines(2, tmp_path, timeout=1)
    with socket.create_server(("127.0.0.1", those.place.port)) as server:
        those.start(1)
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-OpenSSH\r\n")
        connection.close()
        server.close()
        those.wait()
    assert "something answers there that is no launcher" in "\n".join(those.said[1])


def test_a_stranger_is_told_of_and_does_no_harm(tmp_path):
    those = Machines(2, tmp_path)
    those.start(0)
    with at_the_port(those) as connection:
        connection.sendall(b'GET / HTTP/1.0\r\n[[[[\n{"machine": "x"}\n')
        connection.recv(100)
        those.start(1)
        those.wait()
    assert all(isinstance(end, Meeting) for end in those.ended.values()), those.ended
    assert any("somebody at 127.0.0.1 connects and is no launcher" in line for line in those.said[0])
    those.close()


def test_a_machine_that_leaves_may_come_again(tmp_path):
    those = Machines(3, tmp_path)
    those.start(0)
    with at_the_port(those) as connection:
        peer = introduced(connection, those, 1)
        while (peer.hear(20) or {})["waiting"] != "machine 2 of 3":
            pass
    those.start(1)
    those.start(2)
    those.wait()
    assert all(isinstance(end, Meeting) for end in those.ended.values()), those.ended
    assert "machine 0: machine 1 (127.0.0.1) has left" in those.said[0]
    those.close()


@pytest.mark.parametrize(
    ("machine", "changes", "words"),
    [
        (1, {"machines": 2}, "machine 1 (127.0.0.1) has NODES=2, machine 0 has NODES=3"),
        (2, {}, "two machines have NODE_RANK=2: 127.0.0.1 and 127.0.0.1"),
    ],
)
def test_places_that_contradict_each_other(tmp_path, machine, changes, words):
    those = Machines(3, tmp_path)
    those.start(0)
    with at_the_port(those) as connection:
        peer = introduced(connection, those, 2)
        those.start(machine, **changes)
        those.wait()
        while "error" not in (message := peer.hear(20)):
            pass
    assert [those.ended[0], those.ended[machine], message["error"]] == [words] * 3


def test_disagreements_are_one_line_each_and_nothing_starts(tmp_path):
    those = Machines(4, tmp_path)
    here = {"torch": "2.7.1", "training.lr": "1e-05", "data/a.json": "10 bytes (aa)"}
    those.start(0, here)
    those.start(1, here | {"training.lr": "2e-05", "HCCL_BUFFSIZE": "400"})
    those.start(2, {k: v for k, v in here.items() if k != "data/a.json"})
    those.start(3, here | {"training.lr": "2e-05"})
    those.wait()
    lr = "machines 1, 3 have training.lr: 2e-05; machine 0: 1e-05"
    data = "machine 2 has data/a.json: none; machine 0: 10 bytes (aa)"
    buffer = "machine 1 has HCCL_BUFFSIZE: 400; machine 0: none"
    told = {machine: [x for x in said if "waiting" not in x] for machine, said in those.said.items()}
    assert told == {0: [lr, data, buffer], 1: [lr, buffer], 2: [data], 3: [lr]}
    assert set(those.ended.values()) == {"the machines differ in 3 things, told above: nothing was started"}


@pytest.mark.parametrize("machine", [0, 1])
def test_what_a_machine_cannot_read_is_named(tmp_path, machine):
    def unreadable():
        raise PermissionError(13, "Permission denied", "data/a.json")

    those = Machines(2, tmp_path)
    those.start(machine, unreadable)
    those.start(1 - machine)
    those.wait()
    assert [those.ended[n] for n in (0, 1)] == [f"machine {machine}: data/a.json: Permission denied"] * 2


def test_a_save_folder_of_its_own(tmp_path):
    those = Machines(3, tmp_path / "here")
    those.start(0)
    those.start(1)
    those.start(2, talk={"save": tmp_path / "there"})
    those.wait()
    [words] = set(those.ended.values())
    assert words.startswith(
        f"machine 2 does not see what machine 0 writes in {tmp_path / 'here'}: name a training.save"
    )
    assert not list(tmp_path.iterdir())


def test_a_token_that_comes_late_is_seen(tmp_path, monkeypatch):
    """As on a network's file system, which shows a new file when it has forgotten the old listing."""
    looks = []
    real = Path.iterdir

    def iterdir(path):
        looks.append(path)
        return iter(()) if len(looks) < 7 else real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr("qwen35.launch.consistency.time.sleep", lambda _: None)
    with present(tmp_path / "runs") as token:
        assert seen(tmp_path / "runs", token, 20)
        assert [path.name for path in real(tmp_path / "runs")] == [token]
    assert not list(real(tmp_path))


def test_a_folder_that_is_used_stays(tmp_path):
    with present(tmp_path / "runs"):
        (tmp_path / "runs/metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("ahead", "words"), [(75, "75 s ahead of"), (-3600, "3600 s behind"), (1, None)])
def test_clocks_are_told_and_refused_never(tmp_path, ahead, words):
    those = Machines(2, tmp_path)
    those.start(0, talk={"clock": lambda: 1e9})
    those.start(1, talk={"clock": lambda: 1e9 + ahead})
    those.wait()
    assert all(isinstance(end, Meeting) for end in those.ended.values())
    notes = [line for line in those.said[0] if line.startswith("note")]
    assert (words is None and not notes) or f"the clock of machine 1 is {words} machine 0's" in notes[0]
    those.close()


def test_the_end_of_one_machine_is_known_on_all(tmp_path):
    those = Machines(4, tmp_path)
    for machine in range(4):
        those.start(machine)
    those.wait()
    first, *others = (those.ended[machine] for machine in range(4))
    assert [meeting.news() for meeting in (first, *others)] == [None] * 4
    others[0].close(None)  # well
    others[1].close("rank 5 was ended by SIGKILL; out of memory?")
    words = "machine 2 ended: rank 5 was ended by SIGKILL; out of memory?"

    def news(meeting):
        while (found := meeting.news()) is None:
            pass
        return found

    assert news(first) == words
    first.close(words)
    assert news(others[2]) == words
    others[2].close(words)


def test_a_launcher_that_is_killed_is_missed(tmp_path):
    those = Machines(2, tmp_path)
    those.start(0)
    those.start(1)
    those.wait()
    those.ended[1].peers[0].close()  # as the kernel does
    while (found := those.ended[0].news()) is None:
        pass
    assert found == "machine 1 ended: its launcher is gone, killed or with the machine"
    those.close()


def met(save: Path, count: int) -> list[Meeting]:
    those = Machines(count, save)
    for machine in range(count):
        those.start(machine)
    those.wait()
    return [those.ended[machine] for machine in range(count)]


@pytest.mark.parametrize("is_mistake", [False, True])
def test_of_two_machines_the_first_is_told_unless_the_second_explains_it(tmp_path, is_mistake):
    first, second, third = met(tmp_path / "save", 3)

    def recorded(words):
        file = tmp_path / "elsewhere.json"
        while not file.exists() or words not in file.read_text():
            first.record_news(tmp_path)
        return json.loads(file.read_text())

    second.peers[0].tell(failed="rank 1 was ended by SIGKILL")
    told = recorded("SIGKILL")
    assert told["again"] and not told["mistake"]
    third.close("a.json, record 3: no such file" if is_mistake else "rank 2: connection closed", is_mistake)
    told = recorded('"again": false')
    words = "2 ended: a.json, record 3: no such file" if is_mistake else "1 ended: rank 1 was ended by SIGKILL"
    assert (told["message"], told["mistake"]) == (f"machine {words}", is_mistake)
    for meeting in (first, second):
        meeting.close(None)


def test_why_a_machine_does_not_start_again_is_told(tmp_path):
    first, second = met(tmp_path, 2)
    second.close("a.json, record 3: no such file", is_mistake=True)
    with pytest.raises(MeetingError, match=r"^machine 1 ended: a\.json, record 3: no such file$"):
        first.regroup("rank 0: connection closed by peer", 6000)
    assert first.is_mistake
    first.close(None)


def test_who_has_been_told_to_go_on_learns_why_not(tmp_path, monkeypatch):
    """The last one leaves as the others are told already."""
    real, told = Peer.tell, []

    def tell(peer, **message):
        if "go" in message:
            told.append(peer)
            if len(told) == 2:
                raise Left("gone")
        real(peer, **message)

    monkeypatch.setattr(Peer, "tell", tell)
    those = Machines(3, tmp_path)
    for machine in range(3):
        those.start(machine)
    those.wait()
    [going] = [ended for ended in those.ended.values() if isinstance(ended, Meeting)]
    while (found := going.news()) is None:
        pass
    last = 3 - going.place.machine
    assert found == f"machine {last} has left while the machines met: gone"


def test_the_interface_of_a_machines_own_address(monkeypatch):
    loopback = {info.address: name for name, all_of_it in psutil.net_if_addrs().items() for info in all_of_it}[
        "127.0.0.1"
    ]
    assert interface_of("127.0.0.1") == interface_of("localhost") == loopback
    with pytest.raises(
        SettingError, match=rf"no network interface of this machine has that address; there are .*{loopback} 127"
    ):
        interface_of("192.0.2.1")
    with pytest.raises(SettingError, match="no machine of that name"):
        interface_of("no.such.machine.invalid")


# -- what must agree -----------------------------------------------------------------------------------------------------


def test_names_of_machines():
    assert [machines(x) for x in ([1], [3, 1], [0, 1, 2, 5, 7, 8])] == [
        "machine 1",
        "machines 1, 3",
        "machines 0 to 2, 5, 7 to 8",
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


def test_what_agrees(recipe):
    """Settings of one machine's own do not count, nor do variables of its own network."""
    environment = {"HCCL_BUFFSIZE": "200", "PATH": "/bin"}
    cache = "data.dataset_param.basic_parameters.cache_dir=/tmp/other"
    one = facts(recipe(), 8, environment)
    own = {"HCCL_IF_IP": "10.0.0.2", "HCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1", "PATH": "/usr/bin"}
    assert not disagreements({0: one, 1: facts(recipe(cache), 8, environment | own)})
    assert {one["NPUS_PER_NODE"], one["HCCL_BUFFSIZE"]} == {"8", "200"}
    assert re.fullmatch(r"2\.\d+\.\d+", one["torch"]) and one["CANN"] == "none"


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
def test_other_files_are_seen(recipe, tmp_path, act, named):
    before = facts(recipe(), 8, {})
    act(tmp_path)
    found = disagreements({0: before, 1: facts(recipe(), 8, {})})
    assert any(f"machine 1 has {tmp_path}/{named}: " in one.line for one in found), found


@pytest.mark.parametrize(
    ("settings", "processes", "environment", "named"),
    [
        ("training.lr=0.5", 8, {}, "machine 1 has training.lr: 0.5; machine 0: 0.0"),
        ("training.seed=1", 4, {}, "machine 1 has NPUS_PER_NODE: 4; machine 0: 8"),
        (
            "training.seed=1",
            8,
            {"HCCL_DETERMINISTIC": "true"},
            "machine 1 has HCCL_DETERMINISTIC: true; machine 0: none",
        ),
        ("training.seed=1", 8, {"ASCEND_HOME_PATH": "cann"}, "machine 1 has CANN: 8.5.0; machine 0: none"),
    ],
)
def test_other_settings_are_seen(recipe, tmp_path, monkeypatch, settings, processes, environment, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cann/runtime").mkdir(parents=True)
    (tmp_path / "cann/runtime/version.info").write_text("Version=8.5.0\n")
    found = disagreements({0: facts(recipe(), 8, {}), 1: facts(recipe(settings), processes, environment)})
    assert any(one.line.startswith(named) for one in found), found


def test_other_code_is_seen(tmp_path):
    from qwen35.launch.consistency import sources

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/a.py").write_text("1")
    before = sources(tmp_path)
    (tmp_path / "kernels/a.py").write_text("2")
    assert sources(tmp_path) != before
