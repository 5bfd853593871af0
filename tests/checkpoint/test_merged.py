"""A LoRA run's checkpoint as a model: merged slice by slice, and never onto another base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_cases import ADAPTED, SPEC, adapters, model_in, run_on, shapes_in
from checkpoint_cases import (
    MemorySource,
    assert_same_bytes,
    build,
    resave,
    save_checkpoint,
    tensors_in,
    write_folder,
)
from hf_folder import LAYOUTS
from peer import config_dict
from safetensors.torch import load_file

from qwen35.checkpoint.convert import hf_to_dcp
from qwen35.checkpoint.dcp import load_checkpoint, read_info, write_shards
from qwen35.checkpoint.dcp_folder import resolve_load
from qwen35.checkpoint.dcp_source import MODEL, DCPSource
from qwen35.checkpoint.dcp_write import local_shards
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf_names import mappings_of, pair_of
from qwen35.checkpoint.merged import AdapterRun, Merged, digest, open_base, open_weights
from qwen35.checkpoint.slices import TensorSlice, TensorSpec, pieces
from qwen35.convert import main
from qwen35.inference.load_model import ModelSource, load_model


def merged_by_hand(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (weight.double() + SPEC.scale * torch.einsum("...or,...ri->...oi", b.double(), a.double())).to(weight.dtype)


def export(run: Path, origin: Path, out: Path, *more: str) -> int:
    return main(["dcp_to_hf", "--dcp_dir", str(run), "--origin_hf_dir", str(origin), "--save_hf_dir", str(out), *more])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [{}, {"moe": False, "tied": True}], ids=["moe", "dense"])
def test_an_export_is_the_source_with_the_adapters_added(tmp_path, capsys, kind, layout):
    """Each changed tensor is rounded once; all others keep their bytes, `mtp.*` too."""
    folder = write_folder(tmp_path / "hf", layout=layout, shard_size=60_000, **kind)
    shapes, made = shapes_in(folder), run_on(folder, tmp_path / "run", folder)
    assert export(tmp_path / "run", folder, tmp_path / "out") == 0
    held = f"the checkpoint's {len(made)} adapters are merged into the weights that they were trained on\n"
    assert held in capsys.readouterr().out
    found, wanted = tensors_in(tmp_path / "out"), tensors_in(folder)
    base = open_base(model_in(folder), folder)
    for name in (n for n in shapes if n.endswith(ADAPTED)):
        whole = base.read(name, TensorSlice.full(shapes[name]))
        merged = merged_by_hand(whole, *(made[adapter] for adapter in pair_of(name)))
        assert not torch.equal(merged, whole)
        for mapping in mappings_of(name, shapes[name], wanted):
            wanted[mapping.disk_name] = merged[mapping.region.slices()].view(mapping.disk_shape)
    assert sum(name.startswith("mtp.") for name in found) > 5
    assert_same_bytes(found, wanted)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_model_is_filled_as_its_export_would_be(tmp_path):
    """What generate and evaluate answer with."""
    folder = write_folder(tmp_path / "hf")
    run_on(folder, tmp_path / "run", folder)
    export(tmp_path / "run", folder, tmp_path / "out")
    asked = load_model(ModelSource(resolve_load(tmp_path / "run"), folder, folder))
    exported = load_model(ModelSource(tmp_path / "out", tmp_path / "out", tmp_path / "out"))
    assert_same_bytes(dict(asked.named_parameters()), dict(exported.named_parameters()))


class Spy(MemorySource):
    """Remembers the largest region that was read of each tensor."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.largest: dict[str, int] = {}

    def read(self, name, region):
        self.largest[name] = max(self.largest.get(name, 0), region.numel)
        return super().read(name, region)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_needs_no_whole_tensor_and_has_the_bits_of_the_whole(dtype):
    shapes = {"a.q_proj.weight": (96, 64), "a.mlp.experts.gate_up_proj": (6, 32, 40), "a.norm.weight": (64,)}
    base = Spy(
        {n: torch.randn(s, generator=torch.Generator().manual_seed(len(n))).to(dtype) for n, s in shapes.items()}
    )
    made = Spy(adapters(shapes))
    source = Merged(base, made, SPEC.scale)
    assert source.specs == {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}
    for limit in (4, 64, 500, 9000):
        for name, shape in shapes.items():
            pair = pair_of(name)
            whole = base.tensors[name]
            if name.endswith(ADAPTED):
                whole = merged_by_hand(whole, *(made.tensors[adapter] for adapter in pair))
            base.largest, made.largest = {}, {}
            for region in pieces(TensorSlice.full(shape), 1, limit):
                assert torch.equal(source.read(name, region), whole[region.slices()])
            assert base.largest[name] <= max(limit, 1)
            if limit == 64 and name.endswith(ADAPTED):  # a row of the weight: all of A's columns, one row of B
                assert made.largest[pair[1]] == made.specs[pair[1]].shape[-1]


def test_adapters_that_do_not_fit_are_one_line():
    base = MemorySource({"a.weight": torch.zeros(6, 4)})
    whole = {"a.lora_A": torch.zeros(2, 4), "a.lora_B": torch.zeros(6, 2)}
    for change, words in (
        ({"a.lora_B": torch.zeros(6, 3)}, r"1 tensor misshapen: a.lora_B is \[6, 3\] instead of \[6, 2\]"),
        ({"b.lora_A": torch.zeros(2, 4)}, "1 tensor not of this model: b.lora_A"),
    ):
        with pytest.raises(CheckpointError, match=f"^the adapters do not fit the base: {words}$"):
            Merged(base, MemorySource(whole | change), 1.0)
    with pytest.raises(CheckpointError, match=r"1 tensor missing: a.lora_B"):
        Merged(base, MemorySource({"a.lora_A": torch.zeros(2, 4)}), 1.0)


# -- which base ------------------------------------------------------------------------------------


def other_values(tensors):
    name = "model.language_model.layers.2.mlp.shared_expert.up_proj.weight"
    tensors[name].view(-1)[5] += 1


@pytest.mark.parametrize("moved", [False, True], ids=["in its place", "gone"])
def test_another_base_is_refused_in_one_line(tmp_path, capsys, moved):
    folder, other = write_folder(tmp_path / "hf"), write_folder(tmp_path / "other")
    resave(other, other_values)
    run_on(folder, tmp_path / "run", folder)
    if not moved:
        assert export(tmp_path / "run", other, tmp_path / "out") == 0  # the base is where the run had it
        return
    shutil.move(folder, tmp_path / "moved")
    assert export(tmp_path / "run", other, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert err == (
        f"mm-convert: {tmp_path}/run/iter_0000003 holds adapters, and their base is not here: "
        f"{other} holds other weights; {folder}: no such folder\n"
    )
    assert export(tmp_path / "run", tmp_path / "moved", tmp_path / "out") == 0


def test_a_base_of_other_dtype_or_layout_is_the_same(tmp_path):
    """And one with or without the tensors of multi-token prediction."""
    folder = write_folder(tmp_path / "hf")
    shapes = shapes_in(folder)
    wanted = digest(open_base(model_in(folder), folder), shapes)
    state = {n: t.float() for n, t in tensors_in(folder).items()}
    wide = tmp_path / "wide"
    shutil.copytree(folder, wide)
    resave(wide, lambda tensors: tensors.update(state))
    stacked = write_folder(tmp_path / "stacked", layout="per_expert", mtp=False)
    hf_to_dcp(folder, tmp_path / "dcp")
    for path in (wide, stacked, tmp_path / "dcp/release"):
        assert digest(open_base(model_in(folder), path), shapes) == wanted, path
    assert digest(MemorySource(dict(build(config_dict(), mtp=False, seed=1).named_parameters())), shapes) != wanted


def test_every_tensor_counts_in_a_digest():
    tensors = {"a": torch.zeros(3000), "b": torch.zeros(5, 7), "c": torch.zeros(2, 2000), "d": torch.zeros(0, 3)}
    wanted = digest(MemorySource(tensors), tensors)
    for name, place in (("a", 0), ("a", 1023), ("b", 34), ("c", 1023)):
        changed = {n: t.clone() for n, t in tensors.items()}
        changed[name].view(-1)[place] = 1
        assert digest(MemorySource(changed), tensors) != wanted, (name, place)
    for other in ({"b": torch.zeros(7, 5)}, {"d": torch.zeros(0, 4)}, {"e": torch.zeros(1)}):
        assert digest(MemorySource(tensors | other), tensors | other) != wanted


@pytest.mark.parametrize("base", ["release", "a full run's"])
def test_a_base_may_be_a_checkpoint(tmp_path, base):
    """Its weights are fp32 after training, and are rounded once, with the adapters added."""
    folder = write_folder(tmp_path / "hf")
    if base == "release":
        hf_to_dcp(folder, tmp_path / "dcp")
        base = tmp_path / "dcp/release"
    else:
        base = save_checkpoint(tmp_path / "full", 7, build(config_dict(), mtp=False, seed=4))
    made = run_on(base, tmp_path / "run", folder)
    assert export(tmp_path / "run", folder, tmp_path / "out") == 0
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    whole = DCPSource(base).read(name, TensorSlice.full(shapes_in(folder)[name]))
    merged = merged_by_hand(whole.float(), *(made[adapter] for adapter in pair_of(name)))
    torch.testing.assert_close(tensors_in(tmp_path / "out")[name], merged.bfloat16(), rtol=0, atol=0)


def test_a_checkpoint_that_does_not_name_its_base_is_damaged(tmp_path):
    folder = write_folder(tmp_path / "hf")
    made = adapters(shapes_in(folder))
    for extra in ({}, {"lora": {"base": "x"}}):
        write_shards(tmp_path / "run", 3, local_shards({MODEL + name: t for name, t in made.items()}), extra)
        with pytest.raises(CheckpointError, match=r"extra.json: does not say which base its adapters belong to"):
            open_weights(tmp_path / "run/iter_0000003", folder)


# -- PEFT's folder ---------------------------------------------------------------------------------


def test_the_option_adapter_writes_peft_s_folder(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")
    made = run_on(folder, tmp_path / "run", folder)
    assert export(tmp_path / "run", folder, tmp_path / "out", "--adapter") == 0
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    nbytes = sum(t.nbytes for t in made.values())
    assert capsys.readouterr().out.endswith(f"{len(made)} tensors, {nbytes:,} bytes, {tmp_path / 'out'}\n")
    first = "model.language_model.layers.3.self_attn.q_proj.lora_A"
    assert torch.equal(tensors[f"base_model.model.{first}.weight"], made[first])
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder) and config["target_modules"] == ["out_proj", "q_proj"]
    save_checkpoint(tmp_path / "full", 1, build(config_dict(), mtp=False))
    assert export(tmp_path / "full", folder, tmp_path / "other", "--adapter") == 1
    assert "holds no adapters but a whole model; leave --adapter out" in capsys.readouterr().err


def test_a_plain_model_does_not_take_adapters(tmp_path):
    """A run of all weights that is pointed at a LoRA run's checkpoint says what to do."""
    folder = write_folder(tmp_path / "hf")
    run_on(folder, tmp_path / "run", folder)
    with pytest.raises(CheckpointError, match=r"holds the adapters of a LoRA run, not a model: set training.lora"):
        load_checkpoint(tmp_path / "run", build(config_dict(), mtp=False))
    assert AdapterRun.of(read_info(tmp_path / "run/iter_0000003")).spec == SPEC


def test_the_end_of_a_tensor_counts_in_a_digest():
    """The rows of added tokens, the last expert: a base that differs there alone is another one."""
    weights = {n: p.detach().clone() for n, p in build(config_dict(), mtp=False).named_parameters()}
    before = digest(MemorySource(weights), weights)
    for name, index in (
        ("model.language_model.embed_tokens.weight", (-40, 3)),
        ("lm_head.weight", (-40, 3)),
        ("model.language_model.layers.0.mlp.experts.down_proj", (-1, -1, -1)),
        ("model.language_model.norm.weight", (-1,)),
    ):
        changed = {n: w.clone() if n == name else w for n, w in weights.items()}
        changed[name][index] += 1
        assert digest(MemorySource(changed), weights) != before, name


def test_a_merge_that_rounds_away_is_told(tmp_path, capsys):
    """An export with the base's own bytes looks like a run that was never merged."""
    folder = write_folder(tmp_path / "hf")
    run_on(folder, tmp_path / "run", folder)
    assert export(tmp_path / "run", folder, tmp_path / "out") == 0
    assert "are the base's still" not in capsys.readouterr().out
    made = {n: t * (1e-9 if "q_proj" in n else 1) for n, t in run_on(folder, tmp_path / "x", folder).items()}
    extra = read_info(resolve_load(tmp_path / "run")).extra
    write_shards(tmp_path / "small", 3, local_shards({MODEL + n: t for n, t in made.items()}), extra)
    assert export(tmp_path / "small", folder, tmp_path / "small_out") == 0
    adapted = sum(n.endswith(ADAPTED) for n in shapes_in(folder))
    line = f"1 of {adapted} weights with an adapter are the base's still, to the last bit (model.language_model.layers.3.self"
    assert line in capsys.readouterr().out
