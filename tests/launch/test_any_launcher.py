"""Training under torchrun, alone, and by several jobs at once on one machine. Real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forked import PATHS, Forked, launched, ran, run_code
from plain import plain
from ports import free_port
from training_runs import ROOT, SAME, WORKER, assert_same_run

from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.network import interface_of
from qwen35.training.metrics import read_metrics

ENDLESS = ("training.train_iters=100000", "training.log_interval=1", WORKER)
ALONE = (sys.executable, "-m", "qwen35.train")


def torchrun(nodes: int = 1, node: int = 0, processes: int = 2, port: int = 0) -> tuple[str, ...]:
    where = ("--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port")
    return (
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *where),
        *(str(port or free_port()), "-m", "qwen35.train"),
    )


def start(workplace: Path, save: Path, command: tuple[str, ...], *overrides: str, **env: str):
    return subprocess.Popen(
        [*command, str(workplace / "recipe.yaml"), f"training.save={save}", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "LOGLEVEL": "ERROR"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fork(workplace: Path, save: Path, command: tuple[str, ...], *overrides: str, **env: str) -> Forked:
    """The same without a start of Python, also of what torchrun starts."""
    words = [*command, str(workplace / "recipe.yaml"), f"training.save={save}", *overrides]
    return Forked(launched, words, {"LOGLEVEL": "ERROR"} | env)


def ended(*processes: subprocess.Popen | Forked) -> list[tuple[int, str, str]]:
    texts = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, plain(out), err) for process, (out, err) in zip(processes, texts, strict=True)]


def wait_for_steps(save: Path, count: int, *processes: subprocess.Popen | Forked) -> None:
    end = time.monotonic() + 300
    while not (save / "metrics.jsonl").exists() or len(read_metrics(save / "metrics.jsonl")) < count:
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def test_a_run_under_torchrun_is_the_same(workplace, two, tmp_path):
    [(code, _, err)] = ended(start(workplace, tmp_path / "run", torchrun(), "training.save_interval=5"))
    assert code == 0, err
    assert_same_run(tmp_path / "run", two)


def test_sigterm_under_torchrun_saves(workplace, tmp_path):
    """torchrun prints its own end; the ranks print no traceback."""
    save = tmp_path / "run"
    process = fork(workplace, save, torchrun(), *ENDLESS)
    wait_for_steps(save, 2, process)
    both = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    [(code, out, err)] = ended(process)
    assert code != 0 and len(both) >= 2  # and workers of the loader
    assert "stopped and saved after step " in out
    assert f"{ROOT}/qwen35/" not in err, err
    step = int(newest_checkpoint(save).name[5:])
    assert step >= 2 and len(read_metrics(save / "metrics.jsonl")) == step
    assert not psutil.wait_procs(both, timeout=60)[1]


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [(signal.SIGTERM, 143, start), (signal.SIGHUP, 143, fork), (signal.SIGINT, 130, fork)],
    ids=["TERM", "HUP", "INT"],
)
def test_a_run_without_a_launcher_says_by_its_exit_code_that_it_stopped(workplace, tmp_path, number, code, how):
    save = tmp_path / "run"
    process = how(workplace, save, ALONE, *ENDLESS)
    wait_for_steps(save, 2, process)
    process.send_signal(number)
    [(ending, out, err)] = ended(process)
    assert (ending, err) == (code, "") and "stopped and saved after step " in out


AT_THE_LAST_STEP = """
import os, signal
from qwen35.training.metrics import Metrics
real = Metrics.flush
def flush(self, *args):  # the signal comes during the last step
    is_last = self.pending[-1].step == 10
    if is_last:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, args[0], args[1] or is_last)
Metrics.flush = flush
from qwen35 import train
from qwen35.rank import leave
import sys
leave(train.main(sys.argv[1:]))
"""


def test_a_run_that_is_asked_to_stop_at_its_last_step_has_finished(workplace, tmp_path):
    save, recipe = tmp_path / "run", str(workplace / "recipe.yaml")
    done = run_code(AT_THE_LAST_STEP, recipe, f"training.save={save}", "training.log_interval=100")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert newest_checkpoint(tmp_path / "run").name == "iter_0000010"


def test_a_users_mistake_on_one_rank_of_torchrun_is_in_its_error_file(workplace, tmp_path):
    """One line of ours, and torchrun's report of it, which it reads from that file."""
    late = "import sys\nfrom qwen35 import train\nfrom qwen35.rank import leave\n"
    late += "import os\nargs = sys.argv[1:] + ['training.trian_iters=3'] * (os.environ['RANK'] == '1')\n"
    (tmp_path / "program.py").write_text(late + "leave(train.main(args))\n")
    command = (*torchrun()[:-2], str(tmp_path / "program.py"))
    [(code, _, err)] = ended(fork(workplace, tmp_path / "run", command))
    words = "unknown setting training.trian_iters; did you mean training.train_iters?"
    assert code == 1 and err.count(f"error: {words}") == 1 and err.count(words) > 1, err
    assert f"{ROOT}/qwen35/" not in err, err


def test_a_rank_that_hangs_without_our_launcher_ends_itself(workplace, tmp_path):
    """With the GIL held in C. Its stacks are printed, and torchrun ends the others."""
    faults = "import os, sys\nsys.argv = ['faults.py', 'rank', *sys.argv[1:]]\n"
    faults += f"exec(compile(open({str(ROOT / 'tests/faults.py')!r}).read(), 'faults.py', 'exec'))\n"
    (tmp_path / "program.py").write_text(faults)
    command = (*torchrun()[:-2], str(tmp_path / "program.py"))
    [(code, _, err)] = ended(fork(workplace, tmp_path / "run", command, FAULTS="0:1:3:hang"))
    assert code == 1
    assert "Timeout (0:00:02)!" in err and "in hang_in_c" in err


STARTS = {  # programs that train, and that start what does
    "torchrun": "from qwen35 import train\nfrom qwen35.rank import leave\nleave(train.main(sys.argv[1:]))\n",
    "ours": "from qwen35.launch import launcher\nsys.exit(launcher.main(sys.argv[1:]))\n",
}


@pytest.mark.parametrize("launcher", STARTS)
def test_nodes_that_differ_load_nothing(workplace, tmp_path, launcher):
    """In version, settings, data, weights: a line each, with the rank, the node and both values."""
    package = tmp_path / "packages/tokenizers-9.9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 9.9.9\n")
    folders, port = [tmp_path / "a", tmp_path / "b"], free_port()
    for folder in folders:  # the same relative paths, as on disks of two machines
        subprocess.run(["cp", "-r", workplace, folder], check=True)
    (folders[1] / "records.json").write_text((workplace / "records.json").read_text() + "\n")
    weights = next((folders[1] / "weights").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    settings = [
        "data.dataset_param.basic_parameters.dataset=records.json", "data.dataset_param.basic_parameters.dataset_dir=.",
        "model.model_name_or_path=weights", "training.init_from_hf_path=weights",
    ]  # fmt: skip
    processes = []
    for node, folder in enumerate(folders):
        place = f"import os, sys\nos.chdir({str(folder)!r})\n" + f"sys.path.insert(0, {str(package.parent)!r})\n" * node
        program, own = place + STARTS[launcher], ["training.lr=0.5"] * node
        options = ("--nnodes", "2", "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port))
        env = {"NODE_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": interface_of("127.0.0.1")}
        if launcher == "torchrun":
            (folder / "program.py").write_text(program)
            words = (*torchrun(2, node, 1, port)[:-2], str(folder / "program.py"))
            processes.append(fork(workplace, tmp_path / "run", words, *settings, *own, **env))
        else:
            words = [*options, str(workplace / "recipe.yaml"), f"training.save={tmp_path / 'run'}", *settings, *own]
            processes.append(Forked(ran, [program, *words], env))
    for code, out, err in ended(*processes):
        assert code == 1 and "Traceback" not in err.partition("listed above: nothing was loaded")[0], err
        lines = err.splitlines()
        assert lines.count("node 1 (rank 1) has training.lr: 0.5; node 0 (rank 0): 0.01") == 1
        assert any(line.startswith("node 1 (rank 1) has tokenizers: 9.9.9; node 0 (rank 0): ") for line in lines)
        for name in ("records.json", f"weights/{weights.name}"):
            [line] = [line for line in lines if line.startswith(f"node 1 (rank 1) has {name}: ")]
            assert line.count(" bytes (") == 2
        assert "error: the nodes differ in 4 things, listed above: nothing was loaded" in err
        assert "weights from" not in out
    assert not (tmp_path / "run").exists()


def test_two_jobs_at_once_do_not_meet(workplace, tmp_path):
    """Of two people on one server, who set no port."""
    words = (*ALONE[:2], "qwen35.launch", "--nproc_per_node", "2", str(workplace / "recipe.yaml"))
    commands = [[*words, "training.train_iters=3", f"training.save={tmp_path / name}"] for name in "abc"]
    for code, _, err in ended(*(Forked(launched, command, {}) for command in commands)):
        assert (code, err) == (0, "")
    curves = [[[line[k] for k in SAME] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in "abc"]
    assert curves[0] == curves[1] == curves[2] and len(curves[0]) == 3


def test_a_stop_through_the_script_keeps_its_exit_code(workplace, tmp_path):
    save = tmp_path / "run"
    args = " ".join([f"training.save={save}", *ENDLESS])
    env = os.environ | {"CONFIG": str(workplace / "recipe.yaml"), "ARGS": args, "DEVICE": "cpu", "CANN_PATH": "none"}
    env |= {"NPUS_PER_NODE": "1"}
    process = subprocess.Popen(
        ["bash", "scripts/finetune.sh"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(save, 2, process)
    process.terminate()
    assert ended(process)[0][0] == 143
    assert newest_checkpoint(save)
