"""Model folders: which weights are read, refusals, reports, and the bounds of messages."""

import json
import re
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    MemorySource,
    build,
    empty_model,
    index_of,
    resave,
    source_of,
    state_of,
    tensors_in,
    write_folder,
)
from mistakes import CONVERT, EXPORT, RESUME, TRAIN, Case, check, parametrized, place, run, whole
from peer import config_dict
from safetensors.torch import load_file, save_file

from qwen35.checkpoint import load_pretrained
from qwen35.checkpoint.convert import dcp_to_hf, hf_to_dcp
from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.checkpoint.dcp_write import write_release
from qwen35.checkpoint.errors import MAX_MESSAGE, CheckpointError, Mismatch
from qwen35.checkpoint.hf import check_export, load_hf, not_read
from qwen35.checkpoint.hf_read import WEIGHTS_INDEX, HFFolder, check_tied
from qwen35.checkpoint.hf_write import save_hf
from qwen35.inference.load_model import find_model
from qwen35.model import ConfigError

__all__ = ["place", "whole"]  # fixtures

EMBEDDING = "model.language_model.embed_tokens.weight"
DENSE = {"moe": False, "mtp": False}


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """An empty folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def embedding_of(folder: Path) -> torch.Tensor:
    model = empty_model(config_dict(moe=False))
    load_hf(model, folder)
    return dict(model.named_parameters())[EMBEDDING].detach()


def peer_embedding(folder: Path) -> torch.Tensor:
    import transformers

    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach()


# -- which weights are read ------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["all there", "stale index alone", "no index"])
def test_model_safetensors_takes_precedence_as_in_transformers(tmp_path, shards):
    folder = write_folder(tmp_path / "hf", shard_size=60_000, **DENSE)
    newer = {name: tensor + 1 if name == EMBEDDING else tensor for name, tensor in tensors_in(folder).items()}
    old = sorted(path.name for path in folder.glob("*.safetensors"))
    save_file(newer, folder / "model.safetensors", metadata={"format": "pt"})
    if shards != "all there":
        for name in old:
            (folder / name).unlink()
    if shards == "no index":
        (folder / WEIGHTS_INDEX).unlink()
    assert torch.equal(embedding_of(folder), newer[EMBEDDING].float())
    assert torch.equal(embedding_of(folder), peer_embedding(folder))
    report = [f"{folder}: not read beside model.safetensors: {', '.join(old[:3])} and {len(old) - 3} more"]
    assert not_read(folder) == report * (shards == "all there")
    # an export like it also has one file, and no index
    save_hf(source_of(folder), folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names and not names & {WEIGHTS_INDEX, *old}
    assert torch.equal(peer_embedding(tmp_path / "out"), newer[EMBEDDING].float())


def test_index_without_its_files_is_refused(tmp_path):
    folder = write_folder(tmp_path / "hf", shard_size=60_000, **DENSE)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        path.unlink()
    with pytest.raises(OSError, match="No such file"):
        peer_embedding(folder)
    count = len(files)
    with pytest.raises(CheckpointError, match=f"{count} of {count} weight files missing: .*and {count - 3} more$"):
        HFFolder(folder)


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors"]
)
def test_weights_of_another_name_are_refused(tmp_path, name):
    folder = write_folder(tmp_path / "hf", **DENSE)
    (file,) = folder.glob("*.safetensors")
    file.rename(folder / name)
    (folder / WEIGHTS_INDEX).unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        peer_embedding(folder)
    with pytest.raises(CheckpointError, match=rf"1 safetensors file, but no {WEIGHTS_INDEX} .*: {name}$"):
        HFFolder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_weights_in_another_form_are_named(tmp_path, name):
    folder = write_folder(tmp_path / "hf", **DENSE)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / name)
    with pytest.raises(CheckpointError, match=rf"no safetensors files; {name}: weights in that form are not read"):
        HFFolder(folder)


# -- adapters and quantized weights ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_named_beside_a_model_and_alone(tmp_path, name):
    folder = write_folder(tmp_path / "hf", **DENSE)
    (folder / name).write_text("{}")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / name, alone)
    for where, words in ((folder, "an adapter beside the model"), (alone, "an adapter, not a model")):
        for look in (HFFolder, not_read, find_model, lambda f: hf_to_dcp(f, tmp_path / "dcp")):
            with pytest.raises(CheckpointError) as caught:
                look(where)
            assert str(caught.value).startswith(f"{where}: {name} is {words}")
            assert "merge it first" in str(caught.value) and len(str(caught.value)) < MAX_MESSAGE
    assert not (tmp_path / "dcp").exists()


def test_peft_names_are_refused(tmp_path):
    """As saved by a model that PEFT wraps."""
    folder = write_folder(tmp_path / "hf", **DENSE)
    tensors = tensors_in(folder)
    (file,) = folder.glob("*.safetensors")
    for rename in (lambda n: f"base_model.model.{n}", lambda n: n.replace("q_proj.", "q_proj.base_layer.")):
        named = {rename(name): tensor for name, tensor in tensors.items()}
        save_file(named, file)
        (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(named, file.name)}))
        with pytest.raises(
            CheckpointError, match=r"\d+ tensors have names that PEFT gives \(.*an adapter that is not merg"
        ) as e:
            HFFolder(folder)
        assert len(str(e.value)) < MAX_MESSAGE


@pytest.mark.parametrize(
    "where", ["config.json", "text_config", "hf_quant_config.json", "quant_model_description.json"]
)
def test_quantized_config_is_refused_with_or_without_tensors(tmp_path, where):
    folder = write_folder(tmp_path / "hf", **DENSE)
    entry = {"quantization_config": {"quant_method": "fp8"}}
    if where == "config.json":
        change_config(folder, **entry)
    elif where == "text_config":
        change_config(folder, text_config=config_dict(moe=False)["text_config"] | entry)
    else:
        (folder / where).write_text("{}")
    for whole_ in (True, False):
        if not whole_:
            resave(folder, lambda t: t.clear())
        for look in (HFFolder, not_read, find_model, lambda f: hf_to_dcp(f, tmp_path / "dcp")):
            with pytest.raises(
                (CheckpointError, ConfigError), match=r"says that the weights are quantized.*bf16"
            ) as caught:
                look(folder)
            assert len(str(caught.value)) < MAX_MESSAGE


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_quantized_tensors_without_a_config_are_refused(tmp_path, temporary, dtype):
    folder = write_folder(tmp_path / "hf", **DENSE)
    resave(folder, lambda t: t.update({n: v.to(dtype) for n, v in t.items() if n.endswith("_proj.weight")}))
    with pytest.raises(CheckpointError, match=rf"hf: \d+ tensors of {dtype}, as quantized weights are: ") as caught:
        HFFolder(folder)
    assert len(str(caught.value)) <= MAX_MESSAGE


# -- reports ---------------------------------------------------------------------------------------


def test_unread_files_and_keys_are_reported_once(tmp_path):
    folder = write_folder(tmp_path / "hf", **DENSE)
    for name in (
        "README.md",
        "LICENSE",
        "merges.txt",
        "vocab.json",
        "trainer_state.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "training_args.bin",
        "optimizer.pt",
        "rng_state_0.pth",
        ".hidden",
    ):
        (folder / name).write_text("{}")
    (folder / "figures").mkdir()
    assert not_read(folder) == []
    (folder / "recipe.yaml").touch()
    (folder / "extra.safetensors").touch()
    change_config(folder, author="me")
    assert not_read(folder) == [
        f"{folder}/config.json: not known, and not read: author",
        f"{folder}: not read: extra.safetensors, recipe.yaml",
    ]


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "mm_projector.bin", "consolidated.00.pth", "ema.pt"])
def test_other_weights_beside_safetensors_are_told(tmp_path, name):
    """A trainer that saves a module by itself may mean it to be read."""
    folder = write_folder(tmp_path / "hf", **DENSE)
    (folder / name).touch()
    assert not_read(folder) == [f"{folder}: not read: {name}"]


def test_folder_of_transformers_has_nothing_to_report(tmp_path):
    import transformers

    config = config_dict(moe=False)
    cls = transformers.Qwen3_5ForConditionalGeneration
    model = cls(cls.config_class(**config))
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert not_read(tmp_path / "hf") == []


def test_config_at_odds_with_weights_or_recipe_is_reported(tmp_path):
    folder = write_folder(tmp_path / "hf", moe=True, mtp=False)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config={**text, "output_router_logits": False, "mtp_num_hidden_layers": 0})
    assert not_read(folder) == []
    change_config(folder, text_config={**text, "output_router_logits": True, "mtp_num_hidden_layers": 1})
    router, mtp = not_read(folder)
    assert "text_config.output_router_logits, by which transformers would train load balancing" in router
    assert "mtp_num_hidden_layers is 1, but the weights hold no mtp.*" in mtp
    whole = write_folder(tmp_path / "whole", moe=True, mtp=True)
    change_config(whole, text_config={**text, "mtp_num_hidden_layers": 1})
    assert not_read(whole) == []


# -- tied weights ----------------------------------------------------------------------------------


def test_tying_in_text_config_alone_does_not_count(tmp_path):
    """As in transformers, only the top level counts; the error says what to set."""
    folder = write_folder(tmp_path / "hf", **DENSE)
    text = config_dict(moe=False, tied=True)["text_config"]
    change_config(folder, text_config=text)
    assert "tie_word_embeddings is true in text_config alone" in not_read(folder)[0]
    model = load_pretrained(folder)
    assert not HFFolder(folder).is_tied and not model.config.tie_word_embeddings
    save_hf(MemorySource(dict(model.named_parameters())), folder, tmp_path / "out")
    resave(folder, lambda t: t.pop("lm_head.weight"))
    for attempt in (lambda: load_pretrained(folder), lambda: hf_to_dcp(folder, tmp_path / "dcp")):
        with pytest.raises(CheckpointError, match=r"set tie_word_embeddings: true at the top level.*lm_head.weight"):
            attempt()
    change_config(folder, tie_word_embeddings=True)
    assert not_read(folder) == []
    hf_to_dcp(folder, tmp_path / "dcp")
    dcp_to_hf(tmp_path / "dcp", folder, tmp_path / "out2")
    assert (tmp_path / "out2/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_tied_config_over_another_head_says_what_to_set(tmp_path):
    folder = write_folder(tmp_path / "hf", **DENSE)
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings: false at its top level"):
        check_tied(HFFolder(folder), folder)
    change_config(folder, tie_word_embeddings=False)
    load_hf(load_pretrained(folder), folder)


# -- checks before an export -----------------------------------------------------------------------


def test_impossible_export_is_refused_beforehand(tmp_path):
    folder = write_folder(tmp_path / "hf", moe=False, mtp=False)
    config = config_dict(moe=False, mtp_num_hidden_layers=1)
    check_export(empty_model(config), folder)
    with pytest.raises(CheckpointError, match=r"could not be exported like .*tensors not of this model: mtp"):
        check_export(empty_model(config, mtp=True), folder)
    state = state_of(build(config, mtp=True))
    with pytest.raises(CheckpointError, match="tensors not of this model: mtp"):
        save_hf(MemorySource(state), folder, tmp_path / "out")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for _ in range(2):  # a folder without weights, with and without an index left behind
        check_export(empty_model(config, mtp=True), folder)
        assert not_read(folder) == []
        (folder / WEIGHTS_INDEX).unlink(missing_ok=True)


def test_an_export_or_conversion_without_room_writes_nothing(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "hf", **DENSE)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(CheckpointError, match=f"takes {size:,} bytes, and {size - 1:,} are free"):
        save_hf(source_of(folder), folder, tmp_path / "some/where/out")
    size = sum(spec.nbytes for spec in HFFolder(folder).specs.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(CheckpointError, match=f"dcp: takes {size:,} bytes, and {size - 1:,} are free"):
        hf_to_dcp(folder, tmp_path / "some/where/dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_links_out_of_the_model_folder_are_not_copied(tmp_path):
    folder = write_folder(tmp_path / "hf", **DENSE)
    (tmp_path / "secret").write_text("key")
    (folder / "inside.txt").symlink_to("chat_template.jinja")
    save_hf(source_of(folder), folder, tmp_path / "out")
    assert (tmp_path / "out/inside.txt").read_text() == (folder / "chat_template.jinja").read_text()
    for target in ("../secret", tmp_path / "secret"):
        (folder / "notes.txt").unlink(missing_ok=True)
        (folder / "notes.txt").symlink_to(target)
        for attempt in (
            lambda: save_hf(source_of(folder), folder, tmp_path / "new"),
            lambda: check_export(empty_model(config_dict(moe=False)), folder),
        ):
            with pytest.raises(CheckpointError, match=r"notes\.txt: a link out of the model folder"):
                attempt()
    assert not (tmp_path / "new").exists()


def test_a_folder_of_a_hubs_cache_is_exported(tmp_path):
    """snapshots/<revision>/file -> ../../blobs/<sum>"""
    plain = write_folder(tmp_path / "plain", **DENSE)
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    save_hf(source_of(snapshot), snapshot, tmp_path / "out")
    for path in plain.iterdir():
        copy = tmp_path / "out" / path.name
        assert copy.read_bytes() == path.read_bytes() and not copy.is_symlink()


# -- NaN and infinity ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_nan_and_infinity_are_neither_converted_nor_loaded(tmp_path, value, dtype):
    folder = write_folder(tmp_path / "hf", dtype_of=lambda name: dtype, **DENSE)
    hf_to_dcp(folder, tmp_path / "good")
    name = "model.language_model.layers.1.mlp.up_proj.weight"

    def damage(tensors):
        tensors[name][3, 5] = value
        tensors[name][4, 6] = value

    resave(folder, damage)
    with pytest.raises(CheckpointError, match=f"{name} has NaN or infinite values, 2 in a piece of") as caught:
        hf_to_dcp(folder, tmp_path / "dcp")
    assert str(folder) in str(caught.value)
    with pytest.raises(CheckpointError, match=f"^{folder}: {name} has NaN or infinite values, 2 in a piece of"):
        load_hf(empty_model(config_dict(moe=False)), folder)
    assert not (tmp_path / "dcp").exists()
    release = write_release(source_of(folder), tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=f"^{release}: {name} has NaN or infinite values, 2 in a piece of"):
        dcp_to_hf(tmp_path / "dcp", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=f"^{release}: {name} has NaN or infinite values, 2 in a piece of"):
        load_checkpoint(release, empty_model(config_dict(moe=False)))


# -- bounds of messages ----------------------------------------------------------------------------


def test_message_names_three_tensors_and_a_file_with_all(tmp_path, temporary):
    folder = write_folder(tmp_path / "hf", moe=True, mtp=False, layout="per_expert")
    odd = [f"model.language_model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in (0, 2) for j in (1, 3, 4)][:-1]
    resave(folder, lambda t: [t.pop(name) for name in odd])
    with pytest.raises(CheckpointError) as caught:
        load_hf(empty_model(config_dict()), folder)
    message = str(caught.value)
    found = re.search(r": 5 tensors missing: (.*), …; all of them: (\S+)$", message)
    assert found[1].split(", ") == odd[:3]
    file = Path(found[2])
    assert file.parent == temporary and re.fullmatch(r"qwen35-.*\.txt", file.name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().splitlines()[1:] == [f"missing: {name}" for name in odd]


@pytest.mark.parametrize(("count", "length"), [(1, 10), (1, 10_000), (4, 300), (4, 10_000), (30_000, 10)])
def test_no_message_is_longer_than_its_bound(temporary, count, length):
    names = [f"{'x' * length}{i}" for i in range(count)]
    wrong = Mismatch(dict.fromkeys(("missing", "not of this model", "misshapen", "odd"), names))
    with pytest.raises(CheckpointError) as caught:
        wrong.raise_if_any("some/folder does not fit the model")
    message = str(caught.value)
    assert len(message) <= MAX_MESSAGE and message.startswith(f"some/folder does not fit the model: {count} tensor")
    if "all of them: " in message:
        lines = Path(message.split("all of them: ")[1]).read_text().splitlines()
        assert len(lines) == 1 + 4 * count and f"not of this model: {names[-1]}" in lines
    else:
        assert (count, length) == (1, 10)
    assert len(list(temporary.iterdir())) == ("all of them: " in message)


def test_terminal_control_characters_are_escaped(temporary, tmp_path):
    names = [f"a\x1b[2J{i}\u202e\nb" for i in range(5)]
    with pytest.raises(CheckpointError) as caught:
        Mismatch({"missing": names}).raise_if_any("it")
    assert str(caught.value).startswith(r"it: 5 tensors missing: a\x1b[2J0\u202e\x0ab, ")
    assert len(Path(str(caught.value).split("all of them: ")[1]).read_text().splitlines()) == 6
    folder = write_folder(tmp_path / "hf", **DENSE)
    (folder / names[0]).touch()
    assert not_read(folder) == [rf"{folder}: not read: a\x1b[2J0\u202e\x0ab"]


def test_message_without_a_file_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"9 tensors missing: x0, x1, x2, …; all of them: nowhere, for no file"):
        Mismatch({"missing": [f"x{i}" for i in range(9)]}).raise_if_any("it")


# -- the commands ----------------------------------------------------------------------------------


def unmerged(place: Path) -> None:
    (place / "hf/adapter_config.json").write_text("{}")


def quantized(place: Path) -> None:
    change_config(place / "hf", quantization_config={"quant_method": "gptq", "bits": 4})


def another(place: Path) -> None:
    file = place / "hf" / index_of(place / "hf")["weight_map"]["lm_head.weight"]
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.zeros(600, 48, dtype=torch.bfloat16)
    save_file(tensors, file)


def infinite(place: Path) -> None:
    file = place / "hf" / index_of(place / "hf")["weight_map"]["lm_head.weight"]
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = float("inf")
    save_file(tensors, file)


CASES = [
    Case(f"{what}, {command[0]}", command, words, broken)
    for what, words, broken in (
        ("adapter", ("hf: adapter_config.json is an adapter beside the model", "merge it first"), unmerged),
        ("quantized", ("hf/config.json: quantization_config", "('gptq')", "bring the bf16 checkpoint"), quantized),
    )
    for command in (TRAIN, CONVERT, ("generate", "--model", "hf", "--prompt", "What?"))
]


WORDS = ("what is trained could not be exported like hf", "lm_head.weight is [512, 48] instead of [600, 48]")


@parametrized(
    [
        *CASES,
        Case("infinite", CONVERT, ("hf: lm_head.weight has NaN or infinite values, 1 in a piece of",), infinite),
        Case("not to be exported", RESUME, WORDS, another),
    ]
)
def test_command_is_refused_in_one_line(place, case):
    check(place, case)


def test_commands_report_unread_files(place):
    change_config(place / "hf", author="me")
    (place / "hf/extra.safetensors").touch()
    lines = ["hf/config.json: not known, and not read: author", "hf: not read: extra.safetensors"]
    for command in (TRAIN, CONVERT):
        done = run(place, *command)
        assert done.code == 0, done
        assert [done.out.count(f"{line}\n") for line in lines] == [1, 1], done.out
    assert run(place, *EXPORT).code == 0
