"""Writing Hugging Face folders: byte for byte like the source, or fresh; never half."""

import os

import pytest
import torch
from checkpoint_cases import (
    MemorySource,
    assert_same_bytes,
    build,
    empty_model,
    index_of,
    resave,
    source_of,
    state_of,
    tensors_in,
    write_folder,
)
from hf_folder import LAYOUTS
from peer import config_dict

from qwen35.checkpoint import hf_write
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf import load_hf
from qwen35.checkpoint.hf_write import save_hf

KINDS = [{"moe": True}, {"moe": False, "tied": True}]


def test_a_fresh_checkpoint_looks_like_the_hubs(tmp_path):
    folder = write_folder(tmp_path / "hf", shard_size=40_000)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert files == [f"model.safetensors-{k:05}-of-{len(files):05}.safetensors" for k in range(1, len(files) + 1)]
    index, tensors = index_of(folder), tensors_in(folder)
    assert list(index["weight_map"]) == sorted(tensors)
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    f32 = {name for name, t in tensors.items() if t.dtype == torch.float32}
    assert f32 == {n for n in tensors if n.endswith((".A_log", ".linear_attn.norm.weight"))}
    assert "mtp.layers.0.mlp.experts.7.up_proj.weight" in tensors
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "shard_size"), [(KINDS[0], 30_000), (KINDS[0], 2**30), (KINDS[1], 30_000)])
def test_export_of_the_source_is_byte_identical(tmp_path, kind, layout, shard_size):
    folder = write_folder(tmp_path / "hf", layout=layout, shard_size=shard_size, **kind)
    written = save_hf(source_of(folder), folder, tmp_path / "out")
    assert written.tensors == len(tensors_in(folder))
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_trained_state_is_cast_and_the_rest_is_copied(tmp_path):
    """fp32 state without MTP: cast to the source's dtypes; MTP keeps the source's bytes."""
    folder = write_folder(tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").touch()
    (folder / "processor").mkdir()
    (folder / "processor" / "config.json").write_text("{}")
    trained = {n: p.detach() for n, p in build(config_dict(), mtp=False, seed=5).named_parameters()}
    save_hf(MemorySource(trained), folder, tmp_path / "out")
    out, source = tensors_in(tmp_path / "out"), tensors_in(folder)
    assert {n: (t.dtype, t.shape) for n, t in out.items()} == {n: (t.dtype, t.shape) for n, t in source.items()}
    mtp = [n for n in source if n.startswith("mtp.")]
    assert_same_bytes({n: out[n] for n in mtp}, {n: source[n] for n in mtp})
    for name, tensor in trained.items():
        assert torch.equal(out[name], tensor.to(source[name].dtype)), name
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"processor/config.json", "tokenizer.json", "chat_template.jinja"} < names
    assert not names & {"pytorch_model.bin", ".cache/x"}


def test_stored_head_of_tied_weights_must_equal_the_embedding(tmp_path):
    """If it equals the embedding, the trained embedding is exported for it; else it is an error."""
    folder = write_folder(tmp_path / "hf", moe=False, tied=True, mtp=False)
    embedding = "model.language_model.embed_tokens.weight"
    resave(folder, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    model = empty_model(config_dict(moe=False, tied=True))
    load_hf(model, folder)
    trained = {n: p.detach() * 2 for n, p in model.named_parameters()}
    save_hf(MemorySource(trained), folder, tmp_path / "out")
    out = tensors_in(tmp_path / "out")
    assert torch.equal(out["lm_head.weight"], trained[embedding].to(torch.bfloat16))
    resave(folder, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.language_model\.embed_tokens"):
        load_hf(model, folder)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    folder = write_folder(tmp_path / "hf")
    source = source_of(folder)
    out = tmp_path / "out"
    out.mkdir()
    save_hf(source, folder, out)  # an empty folder is used
    save_hf(source, folder, out)  # one that this program wrote is replaced
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="not written by this program"):
        save_hf(source, folder, other)
    (tmp_path / "out.old").mkdir()  # empty, as left by a job killed while removing it
    save_hf(source, folder, out)
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old/config.json").touch()  # a user's copy may have this name
    with pytest.raises(CheckpointError, match=r"out\.old is in the way"):
        save_hf(source, folder, out)
    for inside in (folder, folder / "new", tmp_path):
        with pytest.raises(CheckpointError, match="two folders"):
            save_hf(source, folder, inside)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "hf")
    good, failing = source_of(folder), source_of(folder)

    def read(name, region):
        if name == "lm_head.weight":
            raise OSError(28, os.strerror(28))
        return good.read(name, region)

    monkeypatch.setattr(failing, "read", read)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        save_hf(failing, folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("file", ["00001", "00004"])
def test_the_export_reads_itself_back(tmp_path, monkeypatch, file):
    """One bit flipped in any file after it was written is noticed."""
    folder = write_folder(tmp_path / "hf", shard_size=60_000)
    read_header = hf_write.read_header

    def flip(path):
        if file in path.name:
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return read_header(path)

    monkeypatch.setattr(hf_write, "read_header", flip)
    with pytest.raises(CheckpointError, match=rf"{file}-of-.*: \S+ read back differs"):
        save_hf(source_of(folder), folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_state_that_does_not_fit_the_source_is_refused(tmp_path):
    folder = write_folder(tmp_path / "hf", mtp=False)
    state = state_of(build(config_dict(), mtp=False))
    del state["lm_head.weight"]
    state["model.new.weight"] = torch.zeros(1)
    state["model.visual.pos_embed.weight"] = torch.zeros(4, 32)
    with pytest.raises(CheckpointError) as caught:
        save_hf(MemorySource(state), folder, tmp_path / "out")
    for words in ("1 tensor missing: lm_head.weight", "not of this model: model.new.weight", "[4, 32] instead of"):
        assert words in str(caught.value)
