"""What all tests share: one thread, no network, and no fresh memory that passes for zeros."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import logging
import signal
import sys
from pathlib import Path

import pytest
import torch

STARTS = str(Path(__file__).parent / "starts")  # whose sitecustomize.py quickens what the tests start

# A shell makes background jobs ignore Ctrl-C, and nohup the closing of a terminal. Children inherit
# that, and some of these tests send both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (STARTS, os.environ.get("PYTHONPATH"))))
gc.disable()  # until all tests are collected: nothing of what they import is garbage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests, and put files with long ones first, so that no lane waits long for the other.

    The ladder has no marks: it needs its script's environment.
    """
    from marks import marks  # tests/ is on the path by now

    for item in items:
        if isinstance(item, pytest.Function) and item.path.name.startswith("test_"):
            for mark in marks(item):
                item.add_marker(mark)
    long = {item.path for item in items if not item.get_closest_marker("quick")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """All modules and tests stay to the end: no collection of garbage need look at them again.

    Nor often at what the tests import, transformers above all: a full collection is rare.
    """
    gc.freeze()
    gc.set_threshold(700, 10, 100)
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """Exit status 5 says why it is one: make would print the number alone."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        terminalreporter.write_line(f"no test matches: {' '.join(terminalreporter.config.invocation_params.args)}")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Start each test from one seed, and fill torch.empty with NaN, so that all is written."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_logger():
    """As a program finds it: set up by an earlier test, it would show caplog each line twice."""
    logger = logging.getLogger("qwen35")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def no_transformers_without_its_mark(request):
    """Keep it from tests that marks.py does not see take part, so that no version misses one."""
    if request.path.name.startswith("test_") and not request.node.get_closest_marker("transformers"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "transformers", None)
            yield
    else:
        yield


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A model folder, 60 records (two of three with an image), and a recipe for them."""
    from training_runs import make_workplace  # as little as possible is imported before the environment above

    return make_workplace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="session")
def two(workplace) -> Path:
    """Two processes, ten steps, a checkpoint after five."""
    from training_runs import train

    save = workplace / "two"
    done = train(workplace, save, 2, "training.save_interval=5")
    assert done.returncode == 0, done.stderr
    (save / "console").write_text(done.stdout)
    return save
