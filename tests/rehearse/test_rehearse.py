"""A rehearsal's figures, against some computed by hand and against a real run of two processes."""

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
import yaml
from forked import spawn
from peer import config_dict, text_only
from ports import free_port
from torch._subclasses.fake_tensor import FakeTensorMode

import rehearse.step as rehearse_step
from qwen35.config.layout import check_layout
from qwen35.config.load import difference, load_settings, to_yaml
from qwen35.config.schema import LoraSettings, Settings
from qwen35.device import init_process
from qwen35.errors import SettingError
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import adapted_by, is_adapter
from qwen35.parallel.fsdp import REPLICATED
from qwen35.parallel.mesh import make_meshes
from qwen35.rank import leave
from qwen35.train import Run, distribute, train_step
from qwen35.training.adapters import choose_trained
from qwen35.training.flops import Flops, token_counts
from qwen35.training.optimizer import GradientNorm
from rehearse.batches import Mix, make_batch
from rehearse.cluster import FakeDevice
from rehearse.communication import Group, Traffic, between_nodes
from rehearse.configs import with_config
from rehearse.memory import Ledger, Peak
from rehearse.operators import Operators
from rehearse.rates import BEST, WORST, RateRange
from rehearse.representatives import Moment, Representatives, assign
from rehearse.scaling import messages
from rehearse.step import Rehearsal, rehearse
from rehearse.step_time import best_and_worst

ROOT = Path(__file__).parents[2]
MIX = Mix(sequence=256)
TOKENS = 512  # of a packed sequence; with more, elementwise work goes through more blocks of rows on a CPU
MiB = 1 << 20
M_MMAP_THRESHOLD = -3  # of malloc.h: what is larger is mapped
BOTH, ATTENTION = ("linear_attention", "full_attention"), ("full_attention",)
LORA = LoraSettings(r=8, target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Turned off: filling new tensors would add operators and touch more memory."""


def recipe(
    folder: Path,
    layers: int = 2,
    depth: int = 2,
    kinds: tuple[str, ...] = BOTH,
    tokens: int = TOKENS,
    **parallel: int | str,
) -> Settings:
    """A recipe for a model whose step needs some hundred megabytes with 2048 tokens."""
    kinds = kinds * (layers // len(kinds))
    sizes = {"vocab_size": 2048, "hidden_size": 512, "num_hidden_layers": layers, "moe_intermediate_size": 128}
    config = config_dict(**sizes, layer_types=kinds)
    config["vision_config"] |= {"out_hidden_size": 512, "depth": depth}
    (folder / "config.json").write_text(json.dumps(config))
    lines = f"""
data: {{dataset_param: {{basic_parameters: {{dataset: none.json, cutoff_len: {tokens}}}}}}}
model: {{model_name_or_path: {folder}}}
training: {{train_iters: 5, save: {folder}-run, lr: 1.0e-3}}
"""
    (folder / "recipe.yaml").write_text(lines)
    return load_settings(folder / "recipe.yaml", [f"parallel.{name}={value}" for name, value in parallel.items()])


def rehearsed(settings: Settings, world: int, is_whole: bool = False, batches: int = 1) -> Rehearsal:
    config = load_config(settings.model.model_name_or_path)
    step = [make_batch(settings, config, MIX)] * batches
    return rehearse(settings, config, step, world, 2, torch.device("cpu"), is_whole=is_whole)


# ── Against a real run ────────────────────────────────────────────────────────────────────────


def process(rank: int, folder: Path, port: int) -> None:
    """The peak of a later step, over what was there before, with and without recomputation."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # freed memory goes back to the kernel at once
    torch.set_num_threads(1)
    where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    device = init_process()
    measured = {}
    settings = load_settings(folder / "recipe.yaml", [])
    config = load_config(settings.model.model_name_or_path)
    for is_first in (True, False):  # the first run warms up what torch makes once per process
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        batch = make_batch(settings, config, MIX)
        run = start(settings, device)
        for recompute in (True,) if is_first else (True, True, False):  # the first step makes the optimizer state
            run.model.recompute(recompute)
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
            train_step(run, [batch], 1e-3, 0.0)
            measured[str(recompute).lower()] = status("VmHWM") - before
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
    """Bytes of this process, as the kernel counts them."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def test_peak_is_within_a_tenth_of_a_real_run(tmp_path):
    """With recomputation and without.

    The vocabulary is small because gloo keeps a copy of what it reduces, as large as a unit's
    gradients, which is not a tensor.
    """
    recipe(tmp_path, layers=4, tokens=2048)
    spawn(process, tmp_path, free_port(), ranks=2)
    measured, counted = json.loads((tmp_path / "measured.json").read_text()), {}
    for recompute, real in measured.items():
        settings = load_settings(tmp_path / "recipe.yaml", [f"parallel.recompute={recompute}"])
        r = rehearsed(settings, 2)
        counted[recompute] = max(r.ledger.peaks()[phase].bytes for phase in ("forward", "backward", "optimizer"))
        print(f"recompute {recompute}: counted {counted[recompute] / MiB:.1f} MiB, measured {real / MiB:.1f}")
        assert 0.9 <= counted[recompute] / real <= 1.1, (recompute, counted[recompute] / MiB, real / MiB)


# ── A few of the layers that are alike, against all of them ───────────────────────────────────


def test_representatives_of_layers_and_parameters():
    assert assign(4, 4) == [0, 1, 2, 3] and assign(7, 4) == [0, 1, 1, 1, 1, 2, 3]
    assert assign(5, 3) == [0, 1, 1, 1, 2] and assign(1, 4) == [0]
    config = load_config(config_dict(layer_types=["linear_attention", "full_attention"] * 6, num_hidden_layers=12))
    reps = Representatives.of(config, 1, is_whole=False)
    assert len(reps.config.text.layer_types) == 8 and [reps.layer(i) for i in (0, 3, 9, 10)] == [0, 3, 5, 6]
    assert (
        reps.parameter("model.language_model.layers.7.mlp.gate.weight")
        == "model.language_model.layers.3.mlp.gate.weight"
    )
    assert reps.parameter("mtp.layers.0.mlp.gate.weight") == "mtp.layers.0.mlp.gate.weight"
    assert [reps.multiplicity(Moment("forward", 0, "text", part)) for part in range(4)] == [1, 3, 1, 1]
    for kinds in (["linear_attention"] * 5 + ["full_attention"], ["linear_attention", "full_attention"] * 3):
        config = load_config(config_dict(layer_types=kinds, num_hidden_layers=6))  # one block, and three: all are run
        assert Representatives.of(config, 1, is_whole=False).config.text == config.text
    seen = [(Moment("forward"), "a"), *[(Moment("forward", 0, "text", part), f"{part}") for part in range(4)]]
    assert "".join(reps.expand(seen)) == "a011123"


def figures(r: Rehearsal) -> dict:
    """All of the step's, without operators, which are counted on NPUs alone."""
    peaks = {phase: peak for phase, peak in r.ledger.peaks().items() if phase != "set-up"}
    return vars(r) | {"ledger": peaks, "communication": r.communication.traffic, "operators": None}


@pytest.mark.parametrize(
    ("depth", "parallel"),
    [
        (5, {"recompute": "true", "tokens": 2048}),  # with storages whose lines are looked up
        (2, {"expert_parallel_size": 2}),
        (5, {"ulysses_parallel_size": 2, "fully_shard_parallel_size": 2}),
    ],
    ids=["recompute", "experts", "ulysses and replicas"],
)
def test_representative_layers_give_the_figures_of_all(tmp_path, capsys, depth, parallel):
    """To the byte: peaks by phase, kind and line, traffic by kind and group, FLOPs, parameters."""
    settings = recipe(tmp_path, 6, depth, ATTENTION, **parallel)
    few, whole = (rehearsed(settings, 4, is_whole) for is_whole in (False, True))
    assert len(few.ledger.changes) < 0.9 * len(whole.ledger.changes)
    assert figures(few) == figures(whole) and not capsys.readouterr().out


@pytest.mark.parametrize("parallel", [{"recompute": "true"}, {"ulysses_parallel_size": 2}], ids=["fsdp", "ulysses"])
def test_a_text_only_model_is_rehearsed(tmp_path, parallel):
    """Without images, which must not be asked for; with YaRN, beyond the length of its training."""
    settings = recipe(tmp_path, 6, kinds=ATTENTION, **parallel)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = text_only(json.loads((tmp_path / "config.json").read_text()))
    config["rope_parameters"] |= yarn
    (tmp_path / "config.json").write_text(json.dumps(config))
    few, whole = (rehearsed(settings, 4, is_whole) for is_whole in (False, True))
    assert figures(few) == figures(whole)
    with torch.device("meta"):
        assert few.parameters == sum(p.numel() for p in Qwen35(load_config(tmp_path)).parameters())
    assert "0% image tokens" in MIX.describe(settings, load_config(tmp_path))
    with pytest.raises(SettingError, match=r"^--images: the model is text-only, leave it out$"):
        make_batch(settings, load_config(tmp_path), Mix(images=0.5))


def test_representative_micro_batches_give_the_figures_of_all(tmp_path):
    """Three for five. Activations are left out: on a CPU they include the host's own tensors."""
    found = []
    for is_whole in (False, True):
        r = rehearsed(recipe(tmp_path, 1, 1, ATTENTION), 4, is_whole, batches=5)
        kinds = {
            phase: peak.by_kind - Counter({"activations": peak.by_kind["activations"]})
            for phase, peak in r.ledger.peaks().items()
        }
        found.append((len(r.ledger.changes), kinds, r.communication.traffic, r.flops, r.tokens))
    assert found[0][1:] == found[1][1:] and found[0][0] < 0.8 * found[1][0] and found[0][-1] == 5 * TOKENS


def test_layers_that_differ_are_all_rehearsed(tmp_path, capsys, monkeypatch):
    """A middle layer keeps a copy of its output: one line says so, and the copy is counted."""
    settings, kept = recipe(tmp_path, 5, 1, ATTENTION), []
    whole = rehearsed(settings, 4, is_whole=True)

    def step(run, *args):
        layer = run.model.model.language_model.layers[2]
        layer.register_forward_hook(lambda layer, args, out: kept.append(out[0].detach() + 1))
        return train_step(run, *args)

    monkeypatch.setattr(rehearse_step, "train_step", step)
    found = rehearsed(settings, 4)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("rehearsing every layer and micro-batch: forward of micro-batch 0, text block 1")
    more = found.ledger.peaks()["forward"].bytes - whole.ledger.peaks()["forward"].bytes
    assert more == TOKENS * 512 * 2


# ── Against figures computed by hand ──────────────────────────────────────────────────────────


def test_storages_are_counted_once_until_they_are_freed():
    ledger = Ledger("cpu")
    with FakeTensorMode() as fake:
        weight = torch.ones(256, 256)  # 256 KiB
    machine = FakeDevice(torch.device("cpu"), [ledger])
    machine.fake = fake
    with machine:
        ledger.claim("parameters", [weight])
        ledger.moment = Moment("forward")
        x = weight * 2
        y = x.view(-1)[:10]
        y.add_(1)  # a view takes no memory
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
        3 * quarter, {"parameters": quarter, "activations": 2 * quarter}, peaks["forward"].by_line
    )
    assert peaks["backward"].bytes == 6 * quarter


def test_shape_inference_of_dtensor_is_not_counted():
    """Under a fake mode of its own, or as on torch 2.10 under the rehearsal's once more."""
    seen = []
    observer = SimpleNamespace(observe=lambda func, *_: seen.append(func.name()))
    with FakeDevice(torch.device("cpu"), [observer]) as machine:
        for mode in (machine.fake, FakeTensorMode()):
            with mode:
                torch.zeros(4)
        assert not seen
        torch.zeros(4)
    assert seen


def test_parameters_that_fsdp_frees_are_not_counted(tmp_path):
    """Layers and experts are gathered and freed in sequence: twice as many need no more memory."""
    gathered = []
    for layers in (4, 8):
        settings = recipe(tmp_path, layers, kinds=ATTENTION, expert_parallel_size=2, recompute="true")
        r = rehearsed(settings, 4)
        gathered.append(r.ledger.peaks()["backward"].by_kind["gathered"])
    assert 0 < gathered[1] < 1.1 * gathered[0]


def test_bytes_of_collectives(tmp_path):
    """Weights are gathered twice in bf16, once in the last unit; gradients are reduced in fp32."""
    settings = recipe(tmp_path)
    with torch.device("meta"):
        model = Qwen35(load_config(tmp_path))
    named = [(n, p.numel()) for n, p in model.named_parameters() if not n.endswith(REPLICATED)]
    last = ("model.language_model.embed_tokens", "model.language_model.norm", "lm_head")
    gathered = sum(count * 2 * (1 if n.startswith(last) else 2) for n, count in named)
    scattered = sum(count * 4 for _, count in named)
    for world in (2, 8):
        r = rehearsed(settings, world)
        found = {
            (kind, group.name.partition("+")[0]): traffic for (kind, group), traffic in r.communication.traffic.items()
        }
        share = (world - 1) / world
        assert found["all-gather", "fsdp"].sent == pytest.approx(gathered * share, rel=0.01)
        assert found["reduce-scatter", "fsdp"].sent == pytest.approx(scattered * share, rel=0.01)
        for key in (("all-gather", "fsdp"), ("reduce-scatter", "fsdp")):
            assert r.lower_bound[key] == pytest.approx(found[key].sent, rel=0.01)
        units = 2 + 1 + 2 + 1  # vision blocks, the rest of the tower, layers, everything else
        assert found["reduce-scatter", "fsdp"].calls == units
        assert found["all-gather", "fsdp"].calls == 2 * units - 1
        assert r.tokens == TOKENS and r.parameters == sum(p.numel() for p in model.parameters())


def test_bytes_between_nodes():
    """16 ranks on 2 nodes: the 8 ranks of a node fetch the other node's half together."""
    sixteen, whole = Group("fsdp", 16, 2), 16.0
    assert between_nodes("all-gather", sixteen, whole * 15 / 16) == pytest.approx(whole / 2 / 8)
    assert between_nodes("all-gather", Group("fsdp", 8, 1), 7.0) == 0
    # 8 of the 16 parts of an all-to-all are for the other node
    assert between_nodes("all-to-all", sixteen, 15.0) == pytest.approx(8.0)


def test_best_and_worst_time_of_a_step():
    """At peak rates one second of arithmetic and half a second of memory; then a collective."""
    operators, communication = Operators(), SimpleNamespace(traffic={})
    operators.seen[Moment("forward")].moved["aten::add", "a line"] = int(0.5 * BEST.memory)
    operators.seen[Moment("backward")].dispatched = 1000
    flops = BEST.flops, 0.0, BEST.flops
    r = Rehearsal(16, 16, 0, Ledger("cpu"), operators, communication, {}, *flops, 0)  # type: ignore[arg-type]
    best, worst = best_and_worst(r, RateRange())
    assert best.overlapped == pytest.approx(1.5) and best.host == pytest.approx(1000 * BEST.host)
    assert worst.serialized == pytest.approx(1 / 0.4 + 0.5 * BEST.memory / WORST.memory + 1000 * WORST.host)
    again = replace(r, recomputed=BEST.flops / 3)
    assert best_and_worst(again, RateRange())[0].arithmetic == pytest.approx(4 / 3)
    traffic = Traffic(1, sent=2 * BEST.within, between=3 * BEST.between)
    operators.seen[Moment("optimizer")].bytes_copied = int(WORST.copies)
    assert best_and_worst(r, RateRange())[1].copies == pytest.approx(2)  # there and back
    operators.seen[Moment("optimizer")].bytes_copied = 0
    communication.traffic["all-gather", Group("fsdp", 16, 2)] = traffic
    assert best_and_worst(r, RateRange())[0].overlapped == 3  # between and within nodes at the same time
    assert best_and_worst(r, RateRange())[1].communication == pytest.approx(
        traffic.sent / WORST.between
    )  # one ring over all ranks


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapters"])
def test_flops_that_recomputation_adds(tmp_path, adapted):
    """The layers' forward, and the tower's where it is trained; never the head's."""
    settings = recipe(tmp_path, kinds=ATTENTION, recompute="true")
    lora = replace(LORA, target_modules=("q_proj",), target_parameters=()) if adapted else None
    settings = replace(settings, training=replace(settings.training, lora=lora))
    config = load_config(tmp_path)
    batch = make_batch(settings, config, MIX)
    with torch.device("meta"):
        model = Qwen35(config)
    layers = Flops(model).of(TOKENS, torch.tensor([256] * (TOKENS // 256)), 0, batch.grid_thw[:0])
    model.model.visual.requires_grad_(False)  # so that it costs its forward
    tower = Flops(model).of(0, torch.tensor([0]), 0, batch.grid_thw)
    r = rehearsed(settings, 2)
    low = 2 * 2 * TOKENS * 8 * (512 + model.model.language_model.layers[0].self_attn.q_proj.out_features)
    assert r.recomputed == pytest.approx(layers / 3 + (low if adapted else tower), rel=0.004)
    assert tower > 0.01 * layers
    assert rehearsed(replace(settings, parallel=replace(settings.parallel, recompute=False)), 2).recomputed == 0


def test_messages_of_a_collective():
    assert messages("all-gather", 16, 2) == (15, 8) and messages("all-reduce", 16, 2) == (30, 16)
    assert messages("all-to-all", 16, 2) == (15, 15)


def test_batch_has_the_mix_that_was_asked_for(tmp_path):
    settings = recipe(tmp_path, tokens=2048)
    config = load_config(tmp_path)
    batch = make_batch(settings, config, Mix(sequence=500, images=0.5, trained=0.2))
    tokens, trained, images = token_counts(batch)
    assert len(batch.input_ids) == tokens == 2048 and batch.cu_seqlens.tolist() == [0, 500, 1000, 1500, 2000, 2048]
    assert 0.17 < trained / tokens < 0.22 and 0.45 < images / tokens < 0.52
    assert len(batch.pixel_values) % settings.data.dataloader_param.patch_bucket == 0
    with pytest.raises(SettingError, match="--images and --trained"):
        make_batch(settings, config, Mix(images=0.7, trained=0.4))


def test_config_is_the_recipes_own_or_the_published_one(tmp_path):
    settings = recipe(tmp_path)
    assert with_config(settings) == (settings, load_config(tmp_path), f"{tmp_path}/config.json")
    named = replace(settings, model=replace(settings.model, model_name_or_path="ckpt/hf_path/Qwen3.5-35B-A3B"))
    there, config, source = with_config(named)
    assert config.text.num_experts == 256 and source.startswith("the published config of 35B-A3B, since ckpt/")
    assert load_config(there.model.model_name_or_path) == config
    for name, source, layers in (
        ("Qwen3.6-35B-A3B", "the published config of 35B-A3B", 40),
        ("Qwen3.8-27B", "the published config of 27B", 64),
        ("Qwen3.8-2.4T-A95B", "the reconstructed config of 2.4T-A95B", 92),
    ):
        named = replace(settings, model=replace(settings.model, model_name_or_path=f"ckpt/hf_path/{name}"))
        _, config, found = with_config(named)
        assert found.startswith(f"{source}, since") and len(config.text.layer_types) == layers
    named = replace(settings, model=replace(settings.model, model_name_or_path="ckpt/my-model"))
    with pytest.raises(SettingError, match=r"model_name_or_path: ckpt/my-model .* 0\.8B, 2B, .*, 2\.4T-A95B;"):
        with_config(named)


@pytest.mark.parametrize("folder", ["configs", "configs/lora"])
def test_every_published_size_has_its_recipe(folder):
    """It names that size; model and NPUs of its first line divide; adapters are on all experts."""
    for path in ROOT.glob("assets/configs/*.json"):
        recipes = sorted((ROOT / folder).glob(f"qwen3_5_{path.stem}*.yaml"))
        assert recipes, path
        for file in recipes:
            settings, config, _ = with_config(load_settings(file, []))
            assert config == load_config(path), file
            for world in npus(file):
                check_layout(settings, world)
            with torch.device("meta"):
                model = Qwen35(config)
            choose_trained(model, settings)
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            adapted = {name for name in map(adapted_by, trained) if ".experts." in name}
            assert all(map(is_adapter, trained)) == (folder == "configs/lora")
            if folder == "configs/lora":  # both stacks of all layers' routed experts, where there are any
                assert len(adapted) == bool(config.text.num_experts) * 2 * len(config.text.layer_types), file
            t = settings.training
            assert (t.train_epochs, t.train_iters, t.save_total_limit) == (1, None, 2), file
            # weights of what is trained, and both moments, in fp32: what the comments say in GB
            size = sum(12 * p.numel() for p in model.parameters() if p.requires_grad)
            said = re.findall(r"# .*(?:checkpoints of|written:) ([\d.]+) ([MGT])B", file.read_text())
            each, most = (float(number) * {"M": 1e6, "G": 1e9, "T": 1e12}[unit] for number, unit in said)
            assert each == pytest.approx(size, rel=0.05) and most == pytest.approx(3 * size, rel=0.05), file


@pytest.mark.parametrize("folder", ["configs", "configs/lora", "configs/long"])
def test_recipes_of_the_family_differ_from_their_base_alone_where_they_must(folder):
    """In the model's name, or in the length of the sequences and what it takes."""
    recipes = [path for path in (ROOT / folder).glob("*.yaml") if "\nbase: " in path.read_text()]
    sizes = {"qwen3_6_27B", "qwen3_6_35B-A3B", "qwen3_8_27B"}
    assert {path.stem for path in recipes} == ({"qwen3_5_27B", "qwen3_5_35B-A3B"} if "long" in folder else sizes)
    for path in recipes:
        base = path.parent / yaml.safe_load(path.read_text())["base"]
        settings, of_base = load_settings(path), load_settings(base)
        if "long" in folder:
            assert check_layout(with_config(settings)[0], *npus(path)).data == 1
            changed = {name.partition(":")[0] for name in difference(of_base, settings)}
            assert changed <= {
                "data.dataset_param.basic_parameters.cutoff_len", "parallel.ulysses_parallel_size", "training.optimizer",
                "training.save", "training.micro_batch_size", "training.gradient_accumulation_steps",
                "training.save_interval", "parallel.expert_parallel_size", "parallel.fully_shard_parallel_size",
            }  # fmt: skip
        else:
            old, name = ("Q" + stem[1:].replace("_", ".", 1).replace("_", "-") for stem in (base.stem, path.stem))
            text = to_yaml(of_base).replace(old, name).replace(base.stem, path.stem)
            assert to_yaml(settings) == text and f"{name}:" in path.read_text().splitlines()[0]


@pytest.mark.parametrize(("size", "of"), [("4B", "configs"), ("35B-A3B", "configs/lora")])
def test_recipes_of_pairs_differ_from_their_base_in_stage_and_data(size, of):
    path = ROOT / f"configs/dpo/qwen3_5_{size}.yaml"
    settings, base = load_settings(path), load_settings(ROOT / of / path.name)
    changed = {name.partition(":")[0] for name in difference(base, settings)}
    basic = "data.dataset_param.basic_parameters"
    always = {"training.stage", "training.save", "training.lr", f"{basic}.dataset"}
    assert changed - {"training.micro_batch_size", f"{basic}.cutoff_len", f"{basic}.cache_dir"} == always
    for world in npus(path):
        check_layout(with_config(settings)[0], world)


def npus(recipe: Path) -> list[int]:
    """Of the first line: "1 NPU with 64 GB", "2, 4 or 8 NPUs …", "2 nodes of 8 NPUs with …"."""
    found = re.search(r": (?:(\d+) nodes? of )?([\d, or]+) NPUs? with 64 GB", recipe.read_text().splitlines()[0])
    assert found, recipe
    return [int(found[1] or 1) * int(count) for count in re.findall(r"\d+", found[2])]


@pytest.mark.parametrize(("folder", "rows"), [("configs", 8), ("configs/lora", 10)])
def test_the_page_and_the_recipes_tell_the_same_peaks(folder, rows):
    text = (ROOT / "docs/npus.md").read_text()
    title = "All recipes as shipped" if folder == "configs" else "with adapters"
    table = text.partition(title)[2].partition("\n\n")[2].split("\n\n")[0].splitlines()[2:]
    assert len(table) == rows
    for row in table:
        size = re.split(r"[ ,]", row.strip("| "))[0]
        peaks = re.findall(r"([\d.]+)(?: GB at the peak| on \d)", (ROOT / folder / f"qwen3_5_{size}.yaml").read_text())
        assert any(f"| {peak} |" in row for peak in peaks), row


def test_the_page_and_the_recipes_of_long_contexts_tell_the_same_peaks():
    text = (ROOT / "docs/npus.md").read_text().partition("\n## Long contexts\n")[2]
    rows = re.findall(r"^\| (\S+), (131,072|262,144) \|.* \| ([\d.]+) \| [^|]+ \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for size, _, peak in rows:
        assert f"{peak} GB" in (ROOT / f"configs/long/qwen3_5_{size}.yaml").read_text()
