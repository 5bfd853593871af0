"""training.deterministic: what it switches and when, what contradicts it, whole runs."""

import os

import pytest
import torch
from mistakes import TRAIN, contents, place, run, whole
from training_runs import tensors, train

from qwen35 import train as training
from qwen35.config.load import load_settings
from qwen35.device import DETERMINISTIC_ENV
from qwen35.training.metrics import read_metrics

__all__ = ["place", "whole"]  # fixtures
ON = "training.deterministic=true"


@pytest.fixture
def clean_environment(monkeypatch):
    """No variable is set before or after the test, and torch's switch is off."""
    for name in DETERMINISTIC_ENV:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("given", [{}, {"HCCL_DETERMINISTIC": "strict"}, {"HCCL_DETERMINISTIC": "True"}], ids=str)
@pytest.mark.parametrize("is_on", [True, False], ids=["on", "off"])
def test_everything_is_switched_before_the_device_is_taken(workplace, monkeypatch, clean_environment, given, is_on):
    def init_process(timeout: float):
        assert torch.are_deterministic_algorithms_enabled() == is_on
        assert torch.utils.deterministic.fill_uninitialized_memory != is_on  # our own tests fill it
        default = {"HCCL_DETERMINISTIC": "true", "CLOSE_MATMUL_K_SHIFT": "1"} if is_on else {}
        assert {name: os.environ[name] for name in DETERMINISTIC_ENV if name in os.environ} == default | given
        raise KeyboardInterrupt

    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(training, "init_process", init_process)
    overrides = [f"training.save={workplace / 'never'}", *([ON] if is_on else [])]
    with pytest.raises(KeyboardInterrupt):
        training.train(load_settings(workplace / "recipe.yaml", overrides))


@pytest.mark.parametrize(("name", "value"), [("HCCL_DETERMINISTIC", "false"), ("CLOSE_MATMUL_K_SHIFT", "0")])
def test_a_contradicting_variable_is_refused(place, name, value):
    before = contents(place)
    done = run(place, *TRAIN, ON, environment={name: value})
    assert done.code in (1, 2) and done.err.count("\n") == 1 and contents(place) == before
    assert f"{name}={value} contradicts training.deterministic: true" in done.err and "leave it unset" in done.err


def test_a_deterministic_run_is_the_same_bit_for_bit(workplace, two, tmp_path):
    """Two processes with validation; on a CPU, where every sum has one order anyway."""
    val_records = "data.val_dataset_param.basic_parameters.dataset=" + str(workplace / "records.json")
    few = "data.val_dataset_param.basic_parameters.max_samples=4"
    validated = (val_records, few, "training.val_interval=5", "training.val_generate=true")
    done = train(workplace, tmp_path / "run", 2, ON, "training.save_interval=5", *validated)
    assert done.returncode == 0, done.stderr
    lines, wanted = (read_metrics(save / "metrics.jsonl") for save in (tmp_path / "run", two))
    assert [line["loss"] for line in lines] == [line["loss"] for line in wanted]
    a, b = tensors(tmp_path / "run"), tensors(two)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = train(workplace, tmp_path / "run", 2, "training.save_interval=5", "training.train_iters=11", *validated)
    assert again.returncode == 0 and "training.deterministic: True -> False" in again.stdout, again
