"""A whole rehearsal: a small recipe passes, and errors are reported in one line each."""

import json
from pathlib import Path

import pytest
import torch
from steps import slice_config
from torch._subclasses.fake_tensor import FakeTensorMode

import rehearse.step
from kernels import npu  # noqa: F401  # registers the device with torch
from rehearse.__main__ import main
from rehearse.cost import moved, workspace
from rehearse.rates import rates_text

NOBODYS = torch.library.Library("npu", "FRAGMENT")
NOBODYS.define("nobodys(Tensor x) -> Tensor")
NOBODYS.impl("nobodys", torch.empty_like, "Meta")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Off: it would add an operator per new tensor."""


@pytest.fixture
def recipe(tmp_path) -> str:
    """A MoE with slice S's widths and one layer of each kind."""
    return write(tmp_path, True, 1)


def write(tmp_path: Path, moe: bool, layers: int) -> str:
    (tmp_path / "model").mkdir()
    config = slice_config(moe, ["linear_attention", "full_attention"] * layers)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"""
data: {{dataset_param: {{basic_parameters: {{dataset: none.json, cutoff_len: 2048}}}}}}
model: {{model_name_or_path: {tmp_path / "model"}}}
parallel: {{recompute: true}}
training: {{train_iters: 5, save: {tmp_path / "run"}}}
""")
    return str(file)


def words(out: str, start: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.startswith(start)]


def test_a_recipe_is_rehearsed(recipe, capsys):
    assert main([recipe, "--nodes", "2"]) == 0
    out, err = capsys.readouterr()
    assert not err and "it fits, waits for nothing and lacks no kernel" in out
    assert f"on 2 x 8 NPUs, model {Path(recipe).parent}/model/config.json" in out
    [scattered] = words(out, "reduce-scatter, fsdp")
    assert scattered[2:5] == ["16", "2", "6"]  # ranks, nodes, units: two vision blocks, the tower, two layers, the rest
    for phase in ("forward", "backward", "optimizer"):
        [numbers] = words(out, phase)
        assert sum(map(float, numbers[1:-1])) == pytest.approx(float(numbers[-1]), abs=0.04)
    assert out.count("0 host syncs") == 3 and "32,768 tokens a step on 16 NPUs" in out


def test_measured_rates_are_taken(recipe, capsys, tmp_path):
    """Measured rates give both bounds, which differ only by overlap; a CPU's rates are refused."""
    rates = tmp_path / "rates.yaml"
    rates.write_text(rates_text("npu", "Ascend910B2", dict.fromkeys(("flops", "memory", "within", "between"), 1e12)))
    assert main([recipe, "--json", "--rates", str(rates)]) == 0
    out = capsys.readouterr().out
    assert "(flops, memory, within, between as measured on Ascend910B2; host stated)" in out
    quick, slow = words(out, "quick"), words(out, "slow")
    assert (
        quick[0][1:3] == slow[0][1:3] and quick[0][4] != slow[0][4]
    )  # arithmetic and memory; the host's part is given
    ends = json.loads(out.splitlines()[-1])
    assert 0 < ends["quick"] < ends["slow"] and ends["peak"] > 1e8
    assert f"between {ends['quick']:.2f} and {ends['slow']:.2f} s" in out
    rates.write_text(rates_text("cpu", "cpu", {"flops": 1e12}))
    assert main([recipe, "--rates", str(rates)]) == 1
    assert "the rates of a cpu (cpu) say nothing of an npu" in capsys.readouterr().err


SPLIT = ["parallel.expert_parallel_size=4", "parallel.ulysses_parallel_size=2"]
HOST = ["parallel.recompute=selective", "parallel.activation_offload=true", "training.optimizer=adamw_swap"]


@pytest.mark.parametrize(("moe", "more"), [(True, SPLIT), (False, HOST)], ids=["experts", "offload"])
def test_few_layers_say_what_all_of_them_do(tmp_path, capsys, moe, more):
    """Five of each kind, of which four are run: every line equals that of a full run."""
    recipe, said = write(tmp_path, moe, 5), []
    for whole in ([], [], ["--whole"]):  # the first run in a process also has DTensor's work on new shapes
        assert main([recipe, *more, *whole]) == 0
        said.append(capsys.readouterr().out.splitlines()[:-1])
    assert said[1] == said[2] and len(said[1]) > 15


def test_expert_and_context_parallelism(recipe, capsys):
    """Row counts are read once per layer, not in recomputation; two ranks share a batch."""
    shared = ["parallel.expert_parallel_size=8", "parallel.ulysses_parallel_size=2"]
    results = {}
    for imbalance in ("1", "4"):
        assert main([recipe, *shared, "--nodes", "2", "--imbalance", imbalance]) == 0
        out, err = capsys.readouterr()
        assert not err and "2 host syncs (counts of rows by expert)" in out and out.count("0 host syncs") == 2
        assert "16,384 tokens a step on 16 NPUs" in out
        [line] = words(out, "all-to-all, ep")
        results[imbalance] = float(line[5])
    assert "the experts of rank 0 get 4.0 times their fair share" in out
    # four times the rows arrive and are sent back; as many as before are sent
    assert 2 < results["4"] / results["1"] < 2.6


def test_optimizer_moments_on_the_host(recipe, capsys):
    """Only the chunks in flight are on the NPU, and their copies do not block."""
    moments = {}
    for optimizer in ("adamw", "adamw_swap"):
        assert main([recipe, f"training.optimizer={optimizer}"]) == 0
        out = capsys.readouterr().out
        moments[optimizer] = float(words(out, "optimizer ")[0][2])
    [line] = words(out, "page-locked")
    assert moments["adamw_swap"] < 0.01 and float(line[5]) == pytest.approx(moments["adamw"], rel=0.05)
    # all return in the optimizer's phase; the rest is the batch
    assert float(line[-1]) == pytest.approx(float(line[5]), abs=0.02)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            lambda run: torch.ops.npu.nobodys(run.model.head_weight.to_local()),
            "npu::nobodys has no kernel for the device",
        ),
        (lambda run: run.model.head_weight.to_local().sum().item(), "aten::_local_scalar_dense waits for the device"),
        (lambda run: run.model.head_weight.to_local()[0].cpu(), "aten::_to_copy copies [1024] to the host"),
    ],
    ids=["kernel", "sync", "copy"],
)
def test_what_would_not_run_is_refused(recipe, capsys, monkeypatch, more, told):
    step = rehearse.step.train_step
    monkeypatch.setattr(rehearse.step, "train_step", lambda run, *args: (more(run), step(run, *args))[1])
    assert main([recipe]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")


def test_a_peak_that_is_too_high_is_refused(recipe, capsys):
    assert main([recipe, "--memory-gb", "1"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "ward, and an NPU has NPU_MEMORY_GB=1; most of it is" in line and "more NODES" in line


def test_what_torch_npus_operators_cost():
    """8 tokens of 16 bf16, 2 experts each, by hand; torch's in tests/rehearse/test_cost.py."""
    with FakeTensorMode(), torch.device("npu:0"):
        tokens, ids = torch.empty(8, 16, dtype=torch.bfloat16), torch.empty(8, 2, dtype=torch.int64)  # 256, 128 bytes
        rows, place = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.int32)  # 512, 64 bytes
        op = torch.ops.npu.npu_moe_token_permute.default
        assert moved(op, (tokens, ids), {}, [rows, place]) == 512 + 128 + 512 + 64  # as many bytes read as written
        assert workspace(op, (tokens, ids), {}, [rows, place]) == (16 << 20) + 6 * 4 * 16
        op = torch.ops.npu.npu_moe_token_permute_grad.default
        assert (
            moved(op, (tokens, rows, ids, place), {}, [tokens.clone()]) == 512 + 64 + 256
        )  # two arguments only give shapes
        op = torch.ops.npu.npu_moe_token_unpermute.default
        assert moved(op, (rows, place, ids.float()), {}, [tokens.clone()]) == 512 + 64 + 64 + 256
        q, kv = torch.empty(8, 4, 32, dtype=torch.bfloat16), torch.empty(8, 2, 32, dtype=torch.bfloat16)
        op, args = torch.ops.npu.npu_fusion_attention_grad.default, (q, kv, kv, q, 4, "TND")
        assert moved(op, args, {}, [q.clone(), kv.clone(), kv.clone()]) == 0
        assert workspace(op, args, {}, []) == (16 << 20) + 4 * (8 * 4 * 32 + 2 * 8 * 2 * 32)  # all three in fp32


def test_invalid_options_are_refused(recipe, capsys):
    for wrong, told in (
        (["parallel.expert_parallel_size=3"], "expert_parallel_size 3 does not divide the 8 processes"),
        (["model.kernels.moe_experts_parallel=alltoallv_gmm"], "rehearse without it, which sends the same"),
        (
            ["model.model_name_or_path=nowhere"],
            "nowhere is not there, and its name ends in none of the published sizes",
        ),
    ):
        assert main([recipe, *wrong]) == 1
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([recipe, "--images", "2"])
    assert "'2' is not a number from 0 to 1" in capsys.readouterr().err


def test_scaling(recipe, capsys, monkeypatch):
    """FSDP's bytes grow with ranks only by 1 - 1/n, its calls not at all, its messages do."""
    monkeypatch.setattr("rehearse.scaling.SIZES", (16, 64))
    assert main([recipe, "--scaling"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "all-gather, fsdp" in line]
    (few, _, sent, _, ratio, *_, calls, flat, _), (many, _, more, *_, same, longer, _) = rows
    assert (
        [few, many] == ["| 16", "| 64"]
        and calls == same
        and int(longer.replace(",", "")) > 4 * int(flat.replace(",", ""))
    )
    assert float(more) / float(sent) == pytest.approx((63 / 64) / (15 / 16), rel=0.02) and float(ratio) == 1
