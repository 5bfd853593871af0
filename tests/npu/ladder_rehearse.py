"""A whole rehearsal: a small recipe passes, and what it must refuse is refused in one line."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from steps import slice_config
from torch._subclasses.fake_tensor import FakeTensorMode

import rehearse.step
from kernels import npu  # noqa: F401  # registers the device with torch
from rehearse import plan
from rehearse.__main__ import main
from rehearse.cost import bytes_moved, workspace
from rehearse.rates import rates_text

ROOT = Path(__file__).parents[2]
LINEAR, FULL = ("linear_attention",), ("full_attention",)
BOTH = (*LINEAR, *FULL)
LIBRARY = torch.library.Library("npu", "FRAGMENT")
LIBRARY.define("without_kernel(Tensor x) -> Tensor")
LIBRARY.impl("without_kernel", torch.empty_like, "Meta")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Turned off: filling each new tensor would be one more operator."""


@pytest.fixture
def recipe(tmp_path) -> str:
    """A MoE with slice S's widths and one layer of each kind."""
    return write(tmp_path, True, 1)


def write(tmp_path: Path, moe: bool, blocks: int, kinds: tuple[str, ...] = BOTH) -> str:
    (tmp_path / "model").mkdir(parents=True)
    config = slice_config(moe, [*kinds] * blocks)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"""
data: {{dataset_param: {{basic_parameters: {{dataset: none.json, cutoff_len: 2048}}}}}}
model: {{model_name_or_path: {tmp_path / "model"}}}
parallel: {{recompute: true}}
training: {{train_iters: 5, save: {tmp_path / "run"}}}
""")
    return str(file)


def columns(out: str, start: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.startswith(start)]


def test_a_recipe_is_rehearsed(recipe, capsys):
    assert main([recipe, "--nodes", "2"]) == 0
    out, err = capsys.readouterr()
    assert not err and "it fits in memory, no host sync is unexpected, no kernel is missing" in out
    assert f"on 2 x 8 NPUs, model {Path(recipe).parent}/model/config.json" in out
    [scattered] = columns(out, "reduce-scatter, fsdp")
    assert scattered[2:5] == ["16", "2", "6"]  # ranks, nodes, units: two vision blocks, the tower, two layers, the rest
    for phase in ("forward", "backward", "optimizer"):
        [numbers] = columns(out, phase)
        assert sum(map(float, numbers[1:-1])) == pytest.approx(float(numbers[-1]), abs=0.04)
    assert out.count("0 host syncs") == 3 and "32,768 tokens a step on 16 NPUs" in out


def test_measured_rates_replace_assumed_ones(recipe, capsys, tmp_path):
    """Both cases have the same measured rates; those of a CPU are refused."""
    rates = tmp_path / "rates.yaml"
    rates.write_text(rates_text("npu", "Ascend910B2", dict.fromkeys(("flops", "memory", "within", "between"), 1e12)))
    assert main([recipe, "--json", "--rates", str(rates)]) == 0
    out = capsys.readouterr().out
    assert "(flops, memory, within, between measured on Ascend910B2; copies, host assumed)" in out
    best, worst = columns(out, "best case"), columns(out, "worst case")
    assert best[0][2:4] == worst[0][2:4]  # arithmetic and memory
    assert best[0][6] != worst[0][6]  # the host's rate is assumed
    summary = json.loads(out.splitlines()[-1])
    assert 0 < summary["best"] < summary["worst"] and summary["peak"] > 1e8
    assert f"between {summary['best']:.2f} and {summary['worst']:.2f} s" in out
    rates.write_text(rates_text("cpu", "cpu", {"flops": 1e12}))
    assert main([recipe, "--rates", str(rates)]) == 1
    assert "the rates of a cpu (cpu), not of an npu" in capsys.readouterr().err


SPLIT = ["parallel.expert_parallel_size=4", "parallel.ulysses_parallel_size=2"]
HOST = ["parallel.recompute=selective", "parallel.activation_offload=true", "training.optimizer=adamw_swap"]


EXPERTS = "training.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
LORA = ["training.lora.r=16", EXPERTS]
ADAPTERS = [*SPLIT, "parallel.recompute=false", *LORA, "training.lora.target_modules=[in_proj_qkv,out_proj]"]
PAIRS = ["training.stage=dpo", SPLIT[0], *LORA, "training.lora.target_modules=[q_proj,o_proj]"]


@pytest.mark.parametrize(
    ("kinds", "moe", "more"),
    [(BOTH, True, SPLIT), (BOTH, False, HOST), (LINEAR, True, ADAPTERS), (FULL, True, PAIRS)],
    ids=["experts", "offload", "adapters", "pairs"],
)
def test_representative_layers_give_the_report_of_all(tmp_path, capsys, kinds, moe, more):
    """Four of five blocks of layers are run, and every line is the same as if all were."""
    small, recipe, reports = write(tmp_path / "small", moe, 1, kinds), write(tmp_path, moe, 5, kinds), []
    assert main([small, *more]) == 0  # the first has operators of DTensor's shape inference, which is cached
    capsys.readouterr()
    for whole in ([], ["--whole"]):
        assert main([recipe, *more, *whole]) == 0
        reports.append(capsys.readouterr().out.splitlines()[:-1])
    assert reports[0] == reports[1] and len(reports[0]) > 15


@pytest.mark.parametrize(
    ("folder", "size", "npus"), [("lora", "2B", 1), ("lora", "35B-A3B", 2), ("dpo", "4B", 8), ("dpo", "35B-A3B", 2)]
)
def test_recipes_of_adapters_and_of_pairs_fit_as_they_say(folder, size, npus, capsys):
    """Without an NPU that shares the weights, and with experts on two."""
    recipe = ROOT / f"configs/{folder}/qwen3_5_{size}.yaml"
    assert main([str(recipe), "--npus-per-node", str(npus)]) == 0
    out, err = capsys.readouterr()
    assert not err
    peak = max(float(columns(out, phase)[0][-1]) for phase in ("forward", "backward", "optimizer"))
    said = re.search(r"`make rehearse` counts ([\d.]+) GB", recipe.read_text())
    assert said and float(said[1]) == pytest.approx(peak, abs=0.051)


def test_expert_and_ulysses_parallelism(recipe, capsys):
    """Token counts are read once a layer, not in recomputation; two ranks share a sequence."""
    shared = ["parallel.expert_parallel_size=16", "parallel.ulysses_parallel_size=2"]
    results = {}
    for imbalance in ("1", "4"):
        assert main([recipe, *shared, "--nodes", "2", "--imbalance", imbalance]) == 0
        out, err = capsys.readouterr()
        assert not err and "2 host syncs (token counts per expert)" in out and out.count("0 host syncs") == 2
        assert "16,384 tokens a step on 16 NPUs" in out
        [line] = columns(out, "all-to-all, fsdp+ep")
        results[imbalance] = float(line[5])
    assert "the experts of rank 0 get 4.0 times the mean" in out
    # rank 0 receives four times the rows and sends them back; it sends out as many as before
    assert 2 < results["4"] / results["1"] < 2.6


def test_adamw_swap_keeps_the_moments_in_host_memory(recipe, capsys):
    """On the NPU are only the chunks in flight, and copies in both directions are asynchronous."""
    moments = {}
    for optimizer in ("adamw", "adamw_swap"):
        assert main([recipe, f"training.optimizer={optimizer}"]) == 0
        out = capsys.readouterr().out
        moments[optimizer] = float(columns(out, "optimizer ")[0][2])
    [line] = columns(out, "pinned host memory")
    assert moments["adamw_swap"] < 0.01 and float(line[3]) == pytest.approx(moments["adamw"], rel=0.05)
    # all of them are copied back in the optimizer's phase; the rest is the batch
    assert float(line[-1]) == pytest.approx(float(line[3]), abs=0.02)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            lambda run: torch.ops.npu.without_kernel(run.model.head_weight.to_local()),
            "npu::without_kernel has no kernel for the device",
        ),
        (lambda run: run.model.head_weight.to_local().sum().item(), "aten::_local_scalar_dense waits for the device"),
        (lambda run: run.model.head_weight.to_local()[0].cpu(), "aten::_to_copy copies [1024] to the host"),
    ],
    ids=["kernel", "sync", "copy"],
)
def test_missing_kernel_sync_and_copy_are_refused(recipe, capsys, monkeypatch, more, message):
    step = rehearse.step.train_step
    monkeypatch.setattr(rehearse.step, "train_step", lambda run, *args: (more(run), step(run, *args))[1])
    assert main([recipe]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


LONGER = "data.dataset_param.basic_parameters.cutoff_len=3840"


def test_peak_over_the_memory_is_refused(recipe, capsys):
    """With what would be enough by arithmetic, if anything is; the first line says so, too."""
    for memory, remedy in ((1, "no setting alone is enough"), (5, "training.optimizer=adamw_swap (4 GB)")):
        assert main([recipe, LONGER, "--memory-gb", str(memory)]) == 1
        out, err = capsys.readouterr()
        [line] = err.splitlines()
        assert f"ward, and an NPU has NPU_MEMORY_GB={memory}; most of it is" in line and remedy in line
        assert out.startswith("DOES NOT FIT: 5.1 of ") and "make plan" in line


def test_bytes_and_workspaces_of_torch_npus_operators():
    """By hand, for 8 tokens of 16 bf16 with 2 experts each; test_cost.py has torch's operators."""
    with FakeTensorMode(), torch.device("npu:0"):
        tokens, ids = torch.empty(8, 16, dtype=torch.bfloat16), torch.empty(8, 2, dtype=torch.int64)  # 256, 128 bytes
        rows, place = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.int32)  # 512, 64 bytes
        op = torch.ops.npu.npu_moe_token_permute.default
        assert (
            bytes_moved(op, (tokens, ids), {}, [rows, place]) == 512 + 128 + 512 + 64
        )  # only rows that are returned are read
        assert workspace(op, (tokens, ids), {}, [rows, place]) == (16 << 20) + 6 * 4 * 16
        op = torch.ops.npu.npu_moe_token_permute_grad.default
        assert (
            bytes_moved(op, (tokens, rows, ids, place), {}, [tokens.clone()]) == 512 + 64 + 256
        )  # of two arguments only the shapes
        op = torch.ops.npu.npu_moe_token_unpermute.default
        assert bytes_moved(op, (rows, place, ids.float()), {}, [tokens.clone()]) == 512 + 64 + 64 + 256
        q, kv = torch.empty(8, 4, 32, dtype=torch.bfloat16), torch.empty(8, 2, 32, dtype=torch.bfloat16)
        op, args = torch.ops.npu.npu_fusion_attention_grad.default, (q, kv, kv, q, 4, "TND")
        assert bytes_moved(op, args, {}, [q.clone(), kv.clone(), kv.clone()]) == 0
        assert workspace(op, args, {}, []) == (16 << 20) + 4 * (8 * 4 * 32 + 2 * 8 * 2 * 32)  # all three in fp32


def test_wrong_arguments_are_refused(recipe, capsys):
    for wrong, message in (
        (["parallel.expert_parallel_size=3"], "expert_parallel_size 3 does not divide the 8 processes"),
        (["model.kernels.moe_experts_parallel=alltoallv_gmm"], "rehearse without it, which sends the same"),
        (
            ["model.model_name_or_path=nowhere"],
            "model.model_name_or_path: nowhere does not exist",
        ),
    ):
        assert main([recipe, *wrong]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([recipe, "--images", "2"])
    assert "'2' is not a number from 0 to 1" in capsys.readouterr().err


def test_scaling(recipe, capsys, monkeypatch):
    """FSDP sends the same but for 1/n, in as many calls, on any number of ranks; messages grow."""
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


def test_a_plan_rehearses_what_it_recommends(recipe, capsys, monkeypatch, tmp_path):
    """Its lines, as settings, give the figures of its table; the cache gives the table again."""
    monkeypatch.setattr(plan, "CACHE", tmp_path / "plan")
    monkeypatch.setattr(plan, "MOST", 6)
    for module in ("rehearse.workers", "rehearse.plan"):  # processes, whose starts take as long as all else
        monkeypatch.setattr(f"{module}.count", lambda: 1)
    tables = []
    for _ in range(2):
        assert plan.main([recipe, "--npus-per-node", "4"]) == 0
        head, *table = capsys.readouterr().out.splitlines()
        assert "on 1 x 4 NPUs of 64 GB" in head and " rehearsed in" in head
        tables.append(table)
    assert tables[0] == tables[1]
    first, pasted = tables[0][1].split(), yaml.safe_load("\n".join(tables[0]).partition("for the recipe:\n")[2])
    given = [f"{section}.{name}={value}" for section, part in pasted.items() for name, value in part.items()]
    assert main([recipe, "--npus-per-node", "4", *given]) == 0
    verdict = capsys.readouterr().out.splitlines()[0]
    assert f" {first[3]} of 64 GB" in verdict and f"{first[0]} to {first[2]} s a step" in verdict
