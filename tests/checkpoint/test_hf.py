"""Hugging Face folders: every layout, errors that list everything, exchange with transformers."""

import inspect
import json
import os
import struct
import threading

import pytest
import torch
import transformers
from checkpoint_cases import (
    MemorySource,
    assert_same_bytes,
    build,
    empty_model,
    index_of,
    resave,
    state_of,
    tensors_in,
    write_folder,
    write_index,
)
from hf_folder import LAYOUTS
from peer import config_dict, peer_inputs, random_model, sample
from safetensors.torch import save_file

from qwen35.checkpoint import load_pretrained, slices
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf import load_hf
from qwen35.checkpoint.hf_names import published_dtype
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.hf_write import save_hf
from qwen35.checkpoint.slices import FiniteSource, TensorSlice, ahead, pieces

KINDS = [{"moe": True}, {"moe": False, "tied": True}]


REGIONS = [((0, 0, 0), (4, 6, 5)), ((1, 0, 0), (2, 6, 5)), ((1, 2, 0), (2, 3, 5)), ((0, 1, 2), (4, 2, 2))]


@pytest.mark.parametrize("region", REGIONS)
def test_regions_are_read_as_by_the_safetensors_library(tmp_path, region):
    whole = torch.randn(4, 6, 5).to(torch.bfloat16)
    save_file({"x": whole, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    folder, region = HFFolder(tmp_path), TensorSlice(*region)
    assert torch.equal(folder.read("x", region), whole[region.slices()])
    assert folder.read("scalar").item() == 3
    assert folder.read("empty").shape == (0, 4)


@pytest.mark.parametrize("limit", [1, 7, 40, 10**6])
def test_pieces_cover_a_region_once_within_their_limit(limit):
    seen = torch.zeros(5, 7, 9)
    inside = TensorSlice((1, 0, 2), (3, 5, 4))
    for piece in pieces(inside, 1, limit):
        assert piece.numel <= max(limit, 1)
        seen[piece.slices()] += 1
    assert seen[inside.slices()].eq(1).all()
    assert seen.sum() == inside.numel


@pytest.mark.parametrize("shard_size", [2**30, 20_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(tmp_path, layout, shard_size):
    folder = write_folder(tmp_path / "hf", layout=layout, shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (shard_size < 2**30)
    config = config_dict(mtp_num_hidden_layers=1)
    wanted = state_of(build(config))
    for mtp in (True, False):
        model = empty_model(config, mtp)
        load_hf(model, folder)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, wanted[name].float()), name
    assert_same_bytes(dict(load_pretrained(folder, mtp=True).named_parameters()), wanted)
    assert {p.dtype for p in load_pretrained(folder, dtype=torch.float32).parameters()} == {torch.float32}


# -- mismatches and damage -------------------------------------------------------------------------


def test_all_that_does_not_fit_is_one_error(tmp_path):
    folder = write_folder(tmp_path / "hf", mtp=False)

    def change(tensors):
        for i in (0, 1):
            del tensors[f"model.language_model.layers.{i}.linear_attn.A_log"]
        del tensors["lm_head.weight"]
        tensors["model.visual.pos_embed.weight"] = torch.zeros(7, 32)
        tensors["model.extra.weight"] = torch.zeros(1)

    resave(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load_hf(empty_model(config_dict()), folder)
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        "3 tensors missing: ",
        "model.language_model.layers.{0-1}.linear_attn.A_log",
        "lm_head.weight",
        "1 tensor not of this model: model.extra.weight",
        "model.visual.pos_embed.weight is [7, 32] instead of [36, 32]",
    ):
        assert words in message


@pytest.mark.parametrize("expert", [2, 7])
def test_missing_experts_are_named(tmp_path, expert):
    folder = write_folder(tmp_path / "hf", mtp=False, layout="per_expert")
    name = f"model.language_model.layers.1.mlp.experts.{expert}.up_proj.weight"
    resave(folder, lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"1 tensor missing: {name}"):
        load_hf(empty_model(config_dict()), folder)


def test_surplus_experts_and_quantised_checkpoints_are_refused(tmp_path):
    folder = write_folder(tmp_path / "hf", mtp=False, layout="per_expert")
    name = "model.language_model.layers.1.mlp.experts.8.up_proj.weight"
    resave(folder, lambda t: t.update({name: torch.zeros(24, 48), "model.x.weight_scale_inv": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=rf"2 tensors not of this model: .*{name}.*, model\.x\.weight_scale_inv"):
        load_hf(empty_model(config_dict()), folder)


def damage_truncate(folder):
    file = min(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 10)


def damage_append(folder):
    with min(folder.glob("*.safetensors")).open("ab") as file:
        file.write(b"more")


def damage_header(folder):
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(struct.pack("<Q", 8) + b"{'oops}}" + b"0" * 50)


def damage_lfs_pointer(folder):
    min(folder.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


def damage_shard(folder):
    min(folder.glob("*.safetensors")).unlink()


def damage_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def damage_index_path(folder):
    write_index(folder, {"weight_map": {"x": "../secret.safetensors"}})


def damage_index_endless(folder):
    write_index(folder, {"weight_map": {"x": "/" + "x" * 100_000}})


def damage_index_empty(folder):
    write_index(folder, {"metadata": {}})


def damage_index_names(folder):
    index = index_of(folder)
    index["weight_map"]["ghost"] = index["weight_map"].pop("lm_head.weight")
    write_index(folder, index)


def damage_all(folder):
    for path in folder.glob("*.safe*"):
        path.unlink()


def damage_unfinished(folder):
    """aria2 gives a file its full size at first, filled with zeros, and this beside it."""
    shard = min(folder.glob("*.safetensors"))
    shard.with_name(f"{shard.name}.aria2").write_bytes(b"\0\1")


def damage_pickle(folder):
    damage_all(folder)
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, r"00001-of-0000\d\.safetensors: truncated, damaged, or not a safetensors file: "),
        (damage_append, "truncated, damaged, or not a safetensors file: "),
        (damage_header, "truncated, damaged, or not a safetensors file: "),
        (damage_lfs_pointer, "truncated, damaged, or not a safetensors file: "),
        (damage_shard, r"1 of \d weight files missing: model.safetensors-00001"),
        (damage_index, r"\d safetensors files, but no model.safetensors.index.json"),
        (damage_index_path, r"'../secret.safetensors' is not a file of this folder"),
        (damage_index_endless, r"'/x{,20}\.\.\.x{,20}' is not a file of this folder"),
        (damage_index_empty, "has no weight_map"),
        (damage_index_names, r"1 tensor missing: ghost; 1 tensor not in model.safetensors.index.json: lm_head.weight"),
        (damage_all, "no safetensors files"),
        (damage_pickle, "no safetensors files"),
        (damage_unfinished, r"00001-of-0000\d\.safetensors\.aria2: a download that did not end"),
    ],
)
def test_damaged_folder_is_refused(tmp_path, damage, words):
    folder = write_folder(tmp_path / "hf", moe=False, mtp=False, shard_size=60_000)
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        load_hf(empty_model(config_dict(moe=False)), folder)


def test_a_hole_in_a_matrix_is_told_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(slices, "HOLE", 64, raising=False)
    folder = write_folder(tmp_path / "hf", moe=False, mtp=False)
    load_hf(empty_model(config_dict(moe=False)), folder)
    assert "zero in whole stretches" not in caplog.text
    name = "model.language_model.layers.1.mlp.up_proj.weight"

    def damage(tensors):
        tensors[name].view(-1)[300:500] = 0
        tensors["model.language_model.layers.3.mlp.up_proj.weight"].zero_()
        tensors["model.language_model.embed_tokens.weight"][-5:] = 0  # as published: rows of no token

    resave(folder, damage)
    load_hf(empty_model(config_dict(moe=False)), folder)
    assert caplog.text.count("zero in whole stretches") == 1
    assert f"{name} is zero" in caplog.text or "layers.3.mlp.up_proj.weight is zero" in caplog.text


def test_threads_that_find_holes_at_once_tell_one(caplog, monkeypatch):
    both = threading.Barrier(2)
    monkeypatch.setattr(slices, "has_hole", lambda values: both.wait(30) >= 0)
    source = FiniteSource(MemorySource({name: torch.zeros(2, 2) for name in "ab"}), "here")
    assert len([*ahead(lambda name: source.read(name, TensorSlice.full((2, 2))), "ab", threads=2)]) == 2
    assert caplog.text.count("zero in whole stretches") == 1


# -- exchange with transformers --------------------------------------------------------------------


def known_inputs(model, record):
    """The inputs that this release of transformers accepts (5.2 takes no token types)."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in peer_inputs(record).items() if name in known}


def peer_class(config):
    return getattr(transformers, config["architectures"][0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_transformers_loads_what_we_write(tmp_path, kind, layout):
    config = config_dict(**kind)
    folder = write_folder(tmp_path / "hf", mtp=True, layout=layout, shard_size=60_000, **kind)
    save_hf(
        MemorySource({n: p.detach() for n, p in build(config, False, seed=3).named_parameters()}),
        folder,
        tmp_path / "out",
    )
    for path, seed in ((folder, 0), (tmp_path / "out", 3)):
        model, info = peer_class(config).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        wanted = state_of(build(config, mtp=True, seed=seed))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, wanted[name].float()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_same_logits_from_an_export(tmp_path, kind, layout):
    """Of an image and text: transformers with the exported weights against the trained model."""
    config = config_dict(**kind)
    folder = write_folder(tmp_path / "hf", mtp=True, layout=layout, **kind)
    trained = random_model(config)
    save_hf(MemorySource({n: p.detach() for n, p in trained.named_parameters()}), folder, tmp_path / "out")
    with torch.no_grad():
        for parameter in trained.parameters():  # rounded as in the export
            parameter.copy_(parameter.to(torch.bfloat16))
        for name, parameter in trained.named_parameters():
            if published_dtype(name) == torch.float32:
                parameter.copy_(tensors_in(tmp_path / "out")[name])
        theirs = peer_class(config).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        record = sample([5, (4, 6), 9])
        expected = theirs(**known_inputs(theirs, record)).logits[0]
        torch.testing.assert_close(trained.logits(record), expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_we_load_what_transformers_writes(tmp_path, kind, dtype):
    config = config_dict(**kind)
    cls = peer_class(config)
    theirs = cls(cls.config_class(**config)).to(dtype)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    ours = load_pretrained(tmp_path / "hf")
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, wanted[name]), name
    # and back: the same files, without MTP
    save_hf(MemorySource(dict(ours.named_parameters())), tmp_path / "hf", tmp_path / "out")
    assert_same_bytes(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "hf"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == config["model_type"]
