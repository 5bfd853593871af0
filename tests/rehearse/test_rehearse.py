"""What a rehearsal counts, against figures made by hand and against a real run of two processes."""

import ctypes
import gc
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from peer import config_dict
from ports import free_port
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import rehearse.step as rehearse_step
from kernels import native
from kernels.features import HAS_GROUPED_MM
from qwen35.config.load import load_settings
from qwen35.config.schema import Settings
from qwen35.device import init_process
from qwen35.errors import SettingError
from qwen35.model import Qwen35, load_config
from qwen35.parallel.fsdp import REPLICATED
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave
from qwen35.train import Run, distribute, train_step
from qwen35.training.flops import token_counts
from qwen35.training.optimizer import GradientNorm
from rehearse.batches import Mix, make_batch
from rehearse.cluster import Machine
from rehearse.communication import Group, Traffic, between_nodes
from rehearse.configs import with_config
from rehearse.memory import Ledger, Peak
from rehearse.operators import Operators
from rehearse.rates import QUICK, SLOW, Ends
from rehearse.representatives import Cut, Moment, shortened
from rehearse.scaling import messages
from rehearse.speed import step_range
from rehearse.step import Rehearsal, rehearse

ROOT = Path(__file__).parents[2]
MIX = Mix(sequence=256)
MiB = 1 << 20
BOTH, ATTENTION = ("linear_attention", "full_attention"), ("full_attention",)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: filling each new tensor would be one more operator, and touch memory that the step does not."""


class EqualShares(list):
    """Of the rows, in the place of a tensor that cannot be read."""

    def tolist(self) -> list[int]:
        return self


@pytest.fixture(autouse=True)
def known_rows(monkeypatch):
    """Where a CPU has no grouped matmul (torch < 2.10) the native one asks how many rows each expert has."""

    def known(op):
        def with_known_rows(rows, other, ends):
            if isinstance(ends, FakeTensor):
                ends = EqualShares(len(rows) * i // len(ends) for i in range(1, len(ends) + 1))
            return op(rows, other, ends)

        return with_known_rows

    for name in () if HAS_GROUPED_MM else ("grouped_matmul", "grouped_weight_grad"):
        monkeypatch.setattr(native, name, known(getattr(native, name)))


def recipe(
    folder: Path, layers: int = 2, depth: int = 2, kinds: tuple[str, ...] = BOTH, **parallel: int | str
) -> Settings:
    """A recipe with a model whose step needs some hundred megabytes."""
    kinds = kinds * (layers // len(kinds))
    sizes = {"vocab_size": 2048, "hidden_size": 512, "num_hidden_layers": layers, "moe_intermediate_size": 128}
    config = config_dict(**sizes, layer_types=kinds)
    config["vision_config"] |= {"out_hidden_size": 512, "depth": depth}
    (folder / "config.json").write_text(json.dumps(config))
    lines = f"""
data: {{dataset_param: {{basic_parameters: {{dataset: none.json, cutoff_len: 2048}}}}}}
model: {{model_name_or_path: {folder}}}
training: {{train_iters: 5, save: {folder}-run, lr: 1.0e-3}}
"""
    (folder / "recipe.yaml").write_text(lines)
    return load_settings(folder / "recipe.yaml", [f"parallel.{name}={value}" for name, value in parallel.items()])


def rehearsed(settings: Settings, world: int, is_whole: bool = False, batches: int = 1) -> Rehearsal:
    config = load_config(settings.model.model_name_or_path)
    step = [make_batch(settings, config, MIX)] * batches
    return rehearse(settings, config, step, world, 2, torch.device("cpu"), is_whole=is_whole)


# ── Against a real run ─────────────────────────────────────────────────────────────────────────────────────────────────


def process(rank: int, folder: Path, port: int) -> None:
    """Two steps of both kinds of run; what the second needs over what the process had before there was a model."""
    torch.set_num_threads(1)
    where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    device = init_process()
    measured = {}
    for recompute in ("true", "false", "true"):  # the first warms up what torch makes once a process
        settings = load_settings(folder / "recipe.yaml", [f"parallel.recompute={recompute}"])
        config = load_config(settings.model.model_name_or_path)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        batch = make_batch(settings, config, MIX)
        run = start(settings, device)
        for _ in range(2 if measured else 1):  # the first makes the optimizer's state
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
            train_step(run, [batch], 1e-3, 0.0)
        measured[recompute] = status("VmHWM") - before
        del run, batch
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps(measured))
    leave(0)


def start(settings: Settings, device: torch.device) -> Run:
    config = load_config(settings.model.model_name_or_path)
    meshes = make_meshes(device.type, settings.parallel)
    with torch.device("meta"):
        model = Qwen35(config)
    optimizer = distribute(settings, model, meshes, device)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.full_like(p, 0.01))
    gradients = GradientNorm(model, meshes.weights["shard"].get_group())
    return Run(settings, device, meshes, model, optimizer, gradients, iter(()), 0, {})


def status(name: str) -> int:
    """Bytes of this process, by the kernel's own count."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def test_the_peak_is_that_of_a_real_run(tmp_path, monkeypatch):
    """Within a tenth of the memory that two processes really take, with recomputation and without.

    The vocabulary is small, for gloo keeps a copy of what it reduces, which is no tensor: as large as a unit's gradients.
    """
    recipe(tmp_path, layers=4)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once: the kernel counts as we do
    mp.start_processes(process, (tmp_path, free_port()), nprocs=2, start_method="spawn")
    measured, counted = json.loads((tmp_path / "measured.json").read_text()), {}
    for recompute, real in measured.items():
        settings = load_settings(tmp_path / "recipe.yaml", [f"parallel.recompute={recompute}"])
        r = rehearsed(settings, 2)
        counted[recompute] = max(r.ledger.peaks()[phase].bytes for phase in ("forward", "backward", "optimizer"))
        print(f"recompute {recompute}: counted {counted[recompute] / MiB:.1f} MiB, measured {real / MiB:.1f}")
        assert 0.9 <= counted[recompute] / real <= 1.1, (recompute, counted[recompute] / MiB, real / MiB)


# ── Of the layers that are alike a few, against all of them ────────────────────────────────────────────────────────────


def test_what_stands_for_what():
    assert shortened(4, 4) == [0, 1, 2, 3] and shortened(7, 4) == [0, 1, 1, 1, 1, 2, 3]
    assert shortened(5, 3) == [0, 1, 1, 1, 2] and shortened(1, 4) == [0]
    config = load_config(config_dict(layer_types=["linear_attention", "full_attention"] * 6, num_hidden_layers=12))
    cut = Cut.of(config, 1, is_whole=False)
    assert len(cut.config.text.layer_types) == 8 and [cut.layer("text", i) for i in (0, 3, 9, 10)] == [0, 3, 5, 6]
    assert cut.name("model.language_model.layers.7.mlp.gate.weight") == "model.language_model.layers.3.mlp.gate.weight"
    assert cut.name("mtp.layers.0.mlp.gate.weight") == "mtp.layers.0.mlp.gate.weight"
    assert [cut.times(Moment("forward", 0, "text", part)) for part in range(4)] == [1, 3, 1, 1]
    for kinds in (["linear_attention"] * 5 + ["full_attention"], ["linear_attention", "full_attention"] * 3):
        config = load_config(config_dict(layer_types=kinds, num_hidden_layers=6))  # no period, and three of them: all
        assert Cut.of(config, 1, is_whole=False).config.text == config.text
    seen = [(Moment("forward"), "a"), *[(Moment("forward", 0, "text", part), f"{part}") for part in range(4)]]
    assert "".join(cut.played(seen)) == "a011123"


def figures(r: Rehearsal) -> dict:
    """Of the step; operators are counted on NPUs alone."""
    peaks = {phase: peak for phase, peak in r.ledger.peaks().items() if phase != "set-up"}
    return vars(r) | {"ledger": peaks, "wire": r.wire.traffic, "operators": None}


@pytest.mark.parametrize(
    ("depth", "parallel"),
    [
        (5, {"recompute": "true"}),
        (2, {"expert_parallel_size": 2}),
        (5, {"ulysses_parallel_size": 2, "fully_shard_parallel_size": 2}),
    ],
    ids=["recompute", "experts", "shared bins and copies"],
)
def test_few_layers_give_the_figures_of_all(tmp_path, capsys, depth, parallel):
    """Every figure, to the byte: peaks of each phase by kind and line, traffic by kind and group, FLOPs, parameters."""
    settings = recipe(tmp_path, 6, depth, ATTENTION, **parallel)
    few, whole = (rehearsed(settings, 4, is_whole) for is_whole in (False, True))
    assert len(few.ledger.changes) < 0.9 * len(whole.ledger.changes)
    assert figures(few) == figures(whole) and not capsys.readouterr().out


def test_few_micro_batches_give_the_figures_of_all(tmp_path):
    """Five are three; but here, where the host is the device, for what it makes of all of them before the first."""
    found = []
    for is_whole in (False, True):
        r = rehearsed(recipe(tmp_path, 1, 2, ATTENTION), 4, is_whole, batches=5)
        kinds = {
            phase: peak.of - Counter({"activations": peak.of["activations"]})
            for phase, peak in r.ledger.peaks().items()
        }
        found.append((len(r.ledger.changes), kinds, r.wire.traffic, r.flops, r.tokens))
    assert found[0][1:] == found[1][1:] and found[0][0] < 0.8 * found[1][0] and found[0][-1] == 5 * 2048


def test_what_is_not_alike_is_rehearsed_whole(tmp_path, capsys, monkeypatch):
    """A layer of the middle keeps a copy of what it returns: found, said, and counted."""
    settings, kept = recipe(tmp_path, 5, kinds=ATTENTION), []
    whole = rehearsed(settings, 4, is_whole=True)

    def step(run, *args):
        layer = run.model.model.language_model.layers[2]
        layer.register_forward_hook(lambda layer, args, out: kept.append(out[0].detach() + 1))
        return train_step(run, *args)

    monkeypatch.setattr(rehearse_step, "train_step", step)
    found = rehearsed(settings, 4)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("all layers are rehearsed, for Moment(phase='forward', batch=0, kind='text', part=1) and")
    more = found.ledger.peaks()["forward"].bytes - whole.ledger.peaks()["forward"].bytes
    assert more == 2048 * 512 * 2


# ── Against figures made by hand ───────────────────────────────────────────────────────────────────────────────────────


def test_storages_are_counted_once_and_until_they_are_gone():
    ledger = Ledger("cpu")
    with FakeTensorMode() as fake:
        weight = torch.ones(256, 256)  # 256 KiB
    machine = Machine(torch.device("cpu"), [ledger])
    machine.fake = fake
    with machine:
        ledger.claim("parameters", [weight])
        ledger.moment = Moment("forward")
        x = weight * 2
        y = x.view(-1)[:10]
        y.add_(1)  # a view: nothing more
        del x
        z = weight + 1  # y keeps all of x alive
        del y
        z = z + 1
        ledger.moment = Moment("backward")
        z.add_(1)
        buffer = torch.zeros(1024, 256)
        del buffer
    quarter = 256 * 256 * 4
    peaks = ledger.peaks()
    assert peaks["forward"] == Peak(
        3 * quarter, {"parameters": quarter, "activations": 2 * quarter}, peaks["forward"].at
    )
    assert peaks["backward"].bytes == 6 * quarter


def test_what_dtensor_asks_for_shapes_is_not_counted():
    """By a fake mode of its own, or as on torch 2.10 by the rehearsal's, entered once more."""
    seen = []
    observer = SimpleNamespace(saw=lambda func, *_: seen.append(func.name()))
    with Machine(torch.device("cpu"), [observer]) as machine:
        for mode in (machine.fake, FakeTensorMode()):
            with mode:
                torch.zeros(4)
        assert not seen
        torch.zeros(4)
    assert seen


def test_what_fsdp_frees_is_seen(tmp_path):
    """Layers, and the experts in them, are gathered and freed in turn: twice as many take no more room for gathered weights."""
    gathered = []
    for layers in (4, 8):
        settings = recipe(tmp_path, layers, expert_parallel_size=2, recompute="true")
        r = rehearsed(settings, 4)
        gathered.append(r.ledger.peaks()["backward"].of["gathered"])
    assert 0 < gathered[1] < 1.1 * gathered[0]


def test_bytes_on_the_wire(tmp_path):
    """Every sharded parameter gathered twice in bf16 (those of the last unit once), every gradient scattered once in fp32."""
    settings = recipe(tmp_path)
    with torch.device("meta"):
        model = Qwen35(load_config(tmp_path))
    named = [(n, p.numel()) for n, p in model.named_parameters() if not n.endswith(REPLICATED)]
    last = ("model.language_model.embed_tokens", "model.language_model.norm", "lm_head")
    gathered = sum(count * 2 * (1 if n.startswith(last) else 2) for n, count in named)
    scattered = sum(count * 4 for _, count in named)
    for world in (2, 8):
        r = rehearsed(settings, world)
        found = {(kind, group.name.partition("+")[0]): traffic for (kind, group), traffic in r.wire.traffic.items()}
        share = (world - 1) / world
        assert found["all-gather", "fsdp"].sent == pytest.approx(gathered * share, rel=0.01)
        assert found["reduce-scatter", "fsdp"].sent == pytest.approx(scattered * share, rel=0.01)
        for key in (("all-gather", "fsdp"), ("reduce-scatter", "fsdp")):
            assert r.least[key] == pytest.approx(found[key].sent, rel=0.01)
        units = 2 + 1 + 2 + 1  # vision blocks, the rest of the tower, layers, all else
        assert found["reduce-scatter", "fsdp"].calls == units
        assert found["all-gather", "fsdp"].calls == 2 * units - 1
        assert r.tokens == 2048 and r.parameters == sum(p.numel() for p in model.parameters())


def test_what_leaves_a_node():
    """Of 16 ranks on 2 nodes, each needs what the other node has: half of the whole, brought by 8 ranks together."""
    sixteen, whole = Group("fsdp", 16, 2), 16.0
    assert between_nodes("all-gather", sixteen, whole * 15 / 16) == pytest.approx(whole / 2 / 8)
    assert between_nodes("all-gather", Group("fsdp", 8, 1), 7.0) == 0
    # of an all-to-all, 8 of the 16 parts are for the other node
    assert between_nodes("all-to-all", sixteen, 15.0) == pytest.approx(8.0)


def test_the_range_of_a_step():
    """One second of arithmetic at the peak, half a second of memory; a wire that within a node is quick."""
    operators, wire = Operators(), SimpleNamespace(traffic={})
    operators.seen[Moment("forward")].moved = int(0.5 * QUICK.memory)
    operators.seen[Moment("backward")].host = 1000
    r = Rehearsal(16, 16, 0, Ledger("cpu"), operators, wire, {}, QUICK.flops, 0)  # type: ignore[arg-type]
    quick, slow = step_range(r, 0.0, Ends())
    assert quick.together == pytest.approx(1.5) and quick.host == pytest.approx(1000 * QUICK.host)
    assert slow.in_turn == pytest.approx(1 / 0.4 + 0.5 * QUICK.memory / SLOW.memory + 1000 * SLOW.host)
    assert step_range(r, 1 / 3, Ends())[0].arithmetic == pytest.approx(4 / 3)
    traffic = Traffic(1, sent=2 * QUICK.within, between=3 * QUICK.between)
    wire.traffic["all-gather", Group("fsdp", 16, 2)] = traffic
    assert step_range(r, 0.0, Ends())[0].together == 3  # the network's part and the node's at once
    assert step_range(r, 0.0, Ends())[1].wire == pytest.approx(traffic.sent / SLOW.between)  # one ring through all


def test_messages_of_a_call():
    assert messages("all-gather", 16, 2) == (15, 8) and messages("all-reduce", 16, 2) == (30, 16)
    assert messages("all-to-all", 16, 2) == (15, 15)


def test_a_batch_is_as_described(tmp_path):
    settings = recipe(tmp_path)
    config = load_config(tmp_path)
    batch = make_batch(settings, config, Mix(sequence=500, images=0.5, trained=0.2))
    tokens, trained, images = token_counts(batch)
    assert len(batch.input_ids) == tokens == 2048 and batch.cu_seqlens.tolist() == [0, 500, 1000, 1500, 2000, 2048]
    assert 0.17 < trained / tokens < 0.22 and 0.45 < images / tokens < 0.52
    assert len(batch.pixel_values) % settings.data.dataloader_param.patch_bucket == 0
    with pytest.raises(SettingError, match="--images and --trained"):
        make_batch(settings, config, Mix(images=0.7, trained=0.4))


def test_whose_config_it_is(tmp_path):
    settings = recipe(tmp_path)
    assert with_config(settings) == (settings, load_config(tmp_path), f"{tmp_path}/config.json")
    named = replace(settings, model=replace(settings.model, model_name_or_path="ckpt/hf_path/Qwen3.5-35B-A3B"))
    there, config, source = with_config(named)
    assert config.text.num_experts == 256 and source.startswith("the published config of 35B-A3B, since ckpt/")
    assert load_config(there.model.model_name_or_path) == config
    named = replace(settings, model=replace(settings.model, model_name_or_path="ckpt/my-model"))
    with pytest.raises(SettingError, match=r"my-model is not there.*0\.8B, 2B"):
        with_config(named)


def test_every_published_size_has_its_recipe():
    for path in ROOT.glob("assets/configs/*.json"):
        settings = load_settings(ROOT / f"configs/qwen3_5_{path.stem}.yaml", [])
        assert with_config(settings)[1] == load_config(path)
