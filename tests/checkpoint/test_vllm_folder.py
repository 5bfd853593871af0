"""What vLLM reads of an export beside its weights: configs, tokenizer, processors, template."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_cases import DATA, MemorySource, build, write_folder, write_text_only
from peer import config_dict, text_only
from safetensors.torch import load_file
from test_vllm import LORA, SPECS, assert_loads, linears
from tokenizer_fixture import PUBLISHED, make_model_folder
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from qwen35.checkpoint.hf_names import shapes_of
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.hf_write import save_hf
from qwen35.checkpoint.peft_folder import write_peft
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import add_adapters, is_adapter

READS = json.loads((DATA / "vllm_reads.json").read_text())
KINDS = {
    "moe": {"moe": True},
    "dense": {"moe": False},
    "tied": {"moe": False, "tied": True},
    "text only, moe": {"moe": True, "text_only": True},
    "text only, tied": {"moe": False, "tied": True, "text_only": True},
}


def read(folder: Path, name: str) -> dict:
    assert (folder / name).is_file(), f"{name} is missing"
    return json.loads((folder / name).read_text())


def assert_serves(folder: Path) -> None:
    config = read(folder, "config.json")
    (architecture,) = config["architectures"]
    kind, text_kind = READS["architectures"][architecture]
    is_text_only = kind == text_kind
    text = config if is_text_only else config["text_config"]
    assert (config["model_type"], text["model_type"]) == (kind, text_kind)
    names = [*READS["text"], *READS["moe" if "moe" in kind else "dense"]]
    assert not [name for name in names if name not in text]
    specs = HFFolder(folder).specs
    top = "model." if is_text_only else "model.language_model."
    assert specs[f"{top}embed_tokens.weight"].shape == (text["vocab_size"], text["hidden_size"])
    assert ("lm_head.weight" in specs) != text["tie_word_embeddings"]
    # every parameter of the model, and of the layer that drafts tokens
    inner = {"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}
    if is_text_only:
        assert_loads(specs, inner, "model of text alone")
    else:
        assert config["tie_word_embeddings"] == text["tie_word_embeddings"]
        assert not [name for name in READS["vision"] if name not in config["vision_config"]]
        assert not [name for name in READS["tokens"] if name not in config]
        assert_loads(specs, config, "model")
    assert text[READS["mtp"]] == 1
    assert_loads(specs, inner, "mtp of text alone" if is_text_only else "mtp")
    # what vLLM opens by transformers
    for name in READS["files"]:
        assert (folder / name).is_file(), f"{name} is missing"
    assert AutoConfig.from_pretrained(folder).model_type == kind
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>")
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 2]
    for name, fields in READS["files of images and videos"].items() if not is_text_only else ():
        assert fields.items() <= read(folder, name).items()


def exported(tmp_path: Path, kind: dict) -> Path:
    """Of a run without MTP, on a folder with all files of a published one."""
    make = write_text_only if kind.get("text_only") else write_folder
    folder = make(tmp_path / "hf", **{name: value for name, value in kind.items() if name != "text_only"})
    for file in make_model_folder(tmp_path / "tokenizer").iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder)
    shutil.copy(PUBLISHED / "video_preprocessor_config.json", folder)
    trained = build(json.loads((folder / "config.json").read_text()), mtp=False, seed=1)
    save_hf(MemorySource(dict(trained.named_parameters())), folder, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_export_has_all_that_vllm_reads(tmp_path, kind):
    assert_serves(exported(tmp_path, kind))


def test_what_is_missing_in_an_export_is_noticed(tmp_path):
    folder = exported(tmp_path, KINDS["dense"])
    for name in (*READS["files"], *READS["files of images and videos"]):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises((AssertionError, OSError, ValueError)):
            assert_serves(folder)
        (folder / name).write_bytes(content)
    config = (folder / "config.json").read_text()
    for key in ("vocab_size", "layer_types", "mtp_num_hidden_layers", "intermediate_size"):
        values = json.loads(config)
        values["text_config"].pop(key)
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises((AssertionError, KeyError)):
            assert_serves(folder)
    (folder / "config.json").write_text(config)
    assert_serves(folder)


@pytest.mark.parametrize("moe", [True, False])
def test_vllm_takes_adapters_of_a_text_only_checkpoint(tmp_path, moe):
    """Those of its linear modules. Stacked experts' it does not, so these have to be merged."""
    config = text_only(config_dict(moe))
    model, (_, spec) = Qwen35(load_config(config)), SPECS["dense"]
    add_adapters(model, spec)
    shapes = shapes_of((n, p) for n, p in model.named_parameters() if not is_adapter(n))
    mine = {n: p for n, p in model.named_parameters() if is_adapter(n)}
    write_peft(MemorySource(mine), spec, shapes, "/base", tmp_path / "adapter", is_text_only=True)
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(names) == len(mine) > 0
    whole = {part: whole for whole, parts in LORA["packed"].items() for part in parts}
    inner = {"text_config": config, "tie_word_embeddings": config["tie_word_embeddings"]}
    known = set(linears(inner, "model of text alone"))
    for name in names:
        module = name.removeprefix(LORA["prefix"]).rpartition(".lora_")[0]
        stem, _, leaf = module.rpartition(".")
        assert f"{stem}.{whole.get(leaf, leaf)}" in known, name
    assert "stacked experts" in (Path(__file__).parents[2] / "docs/guide.md").read_text()


def test_the_guide_names_what_the_table_has():
    """The parsers and the method of speculative decoding, in both languages."""
    for page in ("guide.md", "guide.zh-CN.md"):
        text = (Path(__file__).parents[2] / "docs" / page).read_text()
        for option, value in READS["options"].items():
            assert f"{option} {value}" in text, option
