"""Runs that move experts: equal to those that do not, resumed bit for bit, saved as ever."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hf_folder import write_hf
from test_train_experts import SAME
from training_runs import assert_export_is_the_run, assert_same_run, make_workplace, tensors, train

from qwen35.checkpoint.dcp import CheckpointInfo, read_info
from qwen35.checkpoint.dcp_source import OPTIMIZER
from qwen35.checkpoint.errors import CheckpointError
from qwen35.config.schema import TrainingSettings
from qwen35.model import Qwen35
from qwen35.training.expert_balance import KEY, kept
from qwen35.training.metrics import read_metrics

CONSTANT = ("training.lr_decay_style=constant", "training.lr_warmup_ratio=0")
STEPS = ("training.train_iters=6", "training.save_interval=2", "training.lr=1e-4", *CONSTANT)
SPLIT = (*STEPS, "parallel.expert_parallel_size=4", "parallel.recompute=true")
BALANCE = "training.expert_balance=1.2"
SKEW = 1.8
LORA = (
    "training.lora.r=8",
    "training.lora.target_modules=[q_proj,o_proj]",
    "training.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]",
    "training.optimizer=adamw_swap",
    "training.async_save=true",
)


@pytest.fixture(scope="module")
def skewed(tmp_path_factory) -> Path:
    """A workplace whose router chooses the first 8 of 64 experts thrice as often as the mean."""
    workplace = make_workplace(tmp_path_factory.mktemp("skewed"))
    config = json.loads((workplace / "weights" / "config.json").read_text())
    config["text_config"] |= {"num_experts": 64, "num_experts_per_tok": 4}
    weights = dict(Qwen35.from_config(config, seed=1).state_dict())
    for name, weight in weights.items():
        if name.endswith("mlp.gate.weight"):  # larger logits, positive or negative, are more often among the top
            weight[:8] *= SKEW
    write_hf(weights, config, workplace / "weights")
    return workplace


def run(workplace: Path, save: Path, *overrides: str, processes: int = 4) -> Path:
    done = train(workplace, save, processes, *overrides)
    assert done.returncode == 0, done.stderr
    save.with_suffix(".console").write_text(done.stdout)
    return save


@pytest.fixture(scope="module")
def plain(skewed) -> Path:
    return run(skewed, skewed / "plain", *SPLIT)


@pytest.fixture(scope="module")
def balanced(skewed) -> Path:
    return run(skewed, skewed / "balanced", *SPLIT, BALANCE)


def assert_close(save: Path, reference: Path, limit: float = 1e-6) -> None:
    for a, b in zip(read_metrics(reference / "metrics.jsonl"), read_metrics(save / "metrics.jsonl"), strict=True):
        for key in SAME:
            assert b[key] == pytest.approx(a[key], rel=limit), f"{key} of step {a['step']}"
    for prefix in ("model.", OPTIMIZER):
        found, wanted = tensors(save, prefix), tensors(reference, prefix)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert (value - wanted[name]).norm() <= limit * wanted[name].norm() + 1e-9, name


def shares(save: Path) -> list[float]:
    """The busiest rank's tokens over the mean, as the log says it at each save."""
    text = save.with_suffix(".console").read_text()
    return [float(x) for x in re.findall(r"the busiest rank of a layer has computed ([\d.]+) times the mean", text)]


def test_one_of_eight_ranks_gets_three_times_its_share(skewed):
    """Rank 0 has all of the experts that are chosen thrice as often, until the first save."""
    eight = run(
        skewed,
        skewed / "eight",
        *STEPS,
        BALANCE,
        "parallel.expert_parallel_size=8",
        "training.train_iters=2",
        "training.save_interval=1",
        processes=8,
    )
    before, after = shares(eight)
    assert before == pytest.approx(3, abs=0.3) and after <= 1.2, (before, after)


def test_the_busiest_rank_has_less_to_do(balanced, plain):
    before, *after = shares(balanced)
    assert before > 1.5 and len(after) == 2 and max(after) <= 1.2, (before, after)
    assert not shares(plain)


def test_a_run_is_the_same_as_without(balanced, plain):
    assert_close(balanced, plain)
    files = [
        {path.name: path.stat().st_size for path in (s / "iter_0000002").glob("*.distcp")} for s in (balanced, plain)
    ]
    assert files[0] == files[1] and len(files[0]) == 4


def test_a_checkpoint_says_where_the_experts_were(balanced, plain):
    state = read_info(balanced / "iter_0000002").extra[KEY]
    assert state["ranks"] == 4 and not state["counts"].any()
    assert all(sorted(slots) == list(range(64)) != slots for slots in state["slots"].tolist())
    assert KEY not in read_info(plain / "iter_0000002").extra


@pytest.mark.parametrize("step", [4, 5])
def test_a_resume_is_bit_for_bit(skewed, balanced, tmp_path, step):
    """From a save point; and from a stop between two, which keeps the counts since the last one."""
    save = tmp_path / "again"
    shutil.copytree(balanced, save)
    shutil.rmtree(save / "iter_0000006")
    if step == 5:  # with a constant learning rate a shorter run is the beginning of a longer one
        run(skewed, save, *SPLIT, BALANCE, "training.train_iters=5")
        state, before = (read_info(save / f"iter_000000{n}").extra[KEY] for n in (5, 4))
        assert state["counts"].any() and torch.equal(state["slots"], before["slots"])
    run(skewed, save, *SPLIT, BALANCE)
    assert_same_run(save, balanced)
    assert shares(save) == shares(balanced)[2:]


def test_a_resume_with_other_ranks(skewed, balanced, plain, tmp_path):
    save = tmp_path / "two"
    shutil.copytree(balanced, save)
    shutil.rmtree(save / "iter_0000006")
    again = (*STEPS, BALANCE, "training.gradient_accumulation_steps=2", "parallel.expert_parallel_size=2")
    run(skewed, save, *again, processes=2)
    assert_close(save, plain, 1e-5)


def test_adapters_move_with_their_experts(skewed):
    """With moments on the host, saves in the background, and experts that two ranks share."""
    split = (*STEPS, *LORA, "parallel.expert_parallel_size=2", "training.train_iters=4")
    runs = [
        run(skewed, skewed / f"lora{i}", *split, *extra)
        for i, extra in enumerate([(), ("training.expert_balance=1.05",)])
    ]
    before, *after = shares(runs[1])
    assert before > max(after), (before, after)
    slots = read_info(runs[1] / "iter_0000002").extra[KEY]["slots"].tolist()
    assert all(sorted(places) == list(range(64)) != places for places in slots)
    assert_close(runs[1], runs[0])


def test_an_export_has_the_experts_in_their_own_order(skewed, balanced, tmp_path):
    assert_export_is_the_run(balanced, skewed / "weights", tmp_path / "hf")


def test_damaged_states_are_refused(skewed, balanced, tmp_path):
    t = TrainingSettings(train_iters=1, save="x", expert_balance=1.2)
    slots = torch.tensor([[1, 0, 2, 3]], dtype=torch.int32)
    good = {"ranks": 2, "slots": slots, "counts": torch.zeros(1, 4)}

    def of(state: object) -> CheckpointInfo:
        return CheckpointInfo(Path("x/iter_0000002"), 2, 2, True, {KEY: state}, None)

    assert kept(t, of(good)) == {KEY: good}
    assert kept(TrainingSettings(train_iters=1, save="x"), of(good)) == {} == kept(t, None)
    for bad in (
        [],
        good | {"ranks": "2"},
        good | {"slots": slots * 0},
        good | {"counts": torch.zeros(4)},
        {"slots": slots},
    ):
        with pytest.raises(CheckpointError, match="expert_balance"):
            kept(t, of(bad))
