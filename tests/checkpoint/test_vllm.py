"""Exported names against vLLM's loader: every parameter of its model gets all of its parts."""

import json
import re
from collections import Counter

import pytest
from checkpoint_cases import CONFIGS, DATA, LAYOUTS, MemorySource, build, published_shapes, write_folder

from qwen35.checkpoint.hf_names import disk_shapes
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.hf_write import save_hf

VLLM = json.loads((DATA / "vllm_names.json").read_text())
EXPERTS = VLLM["experts"]
PARTS = {part: whole for whole, parts in VLLM["parts"].items() for part in parts}


def expected(config: dict, load: str) -> set[str]:
    """The parameters of vLLM's model, or of its model of the multi-token-prediction layer."""
    known, text = VLLM["parameters"], config["text_config"]
    ffn = known["moe"] if "num_experts" in text else known["dense"]
    head = [] if config["tie_word_embeddings"] else ["lm_head.weight"]
    if load == "mtp":
        layer = [*known["norms"], *known["full_attention"], *ffn]
        return {*(f"model.{n}" for n in known["mtp"]), *(f"model.layers.0.{n}" for n in layer), *head}
    inner = ["embed_tokens.weight", "norm.weight"]
    for i, kind in enumerate(text["layer_types"]):
        inner += [f"layers.{i}.{n}" for n in (*known["norms"], *known[kind], *ffn)]
    blocks = [f"blocks.{i}.{n}" for i in range(config["vision_config"]["depth"]) for n in known["visual_block"]]
    visual = {f"visual.{n}" for n in (*known["visual"], *blocks)}
    return visual | {f"language_model.{n}" for n in (*(f"model.{n}" for n in inner), *head)}


def taken(names, load: str) -> dict[str, Counter]:
    """Parameter -> the parts of it that vLLM's loader finds among the names of a folder."""
    rules, found = VLLM["loads"][load], {}
    for name in names:
        if name.startswith(tuple(rules["skipped"])):
            continue
        prefix = next(p for p in rules["prefixes"] if name.startswith(p))
        renamed = rules["prefixes"][prefix] + name.removeprefix(prefix)
        if match := re.fullmatch(r"(.+\.mlp\.experts\.)(?:(\d+)\.)?(.+)", renamed):
            stem, expert, rest = match.groups()
            parameter = stem + EXPERTS["stacked" if expert is None else "one"][rest]
            part = (expert, rest)
        else:
            words = renamed.split(".")
            part = next((word for word in words if word in PARTS), "")
            parameter = ".".join(PARTS.get(word, word) for word in words)
        found.setdefault(parameter, Counter())[part] += 1
    return found


def assert_loads(names, config: dict, load: str) -> None:
    """Every parameter gets each part once; experts are all stacked or all separate."""
    found, kinds = taken(names, load), set()
    assert found.keys() == expected(config, load)
    for parameter, parts in found.items():
        assert set(parts.values()) == {1}, parameter
        words = parameter.split(".")
        if ".mlp.experts." in parameter:
            experts = range(config["text_config"]["num_experts"])
            one_by_one = {(str(j), part) for j in experts for part, w in EXPERTS["one"].items() if w == words[-1]}
            stacked = {(None, part) for part, w in EXPERTS["stacked"].items() if w == words[-1]}
            assert set(parts) in (one_by_one, stacked), parameter
            kinds.add(set(parts) == stacked)
        else:
            fused = next((word for word in words if word in VLLM["parts"]), None)
            assert set(parts) == set(VLLM["parts"][fused] if fused else [""]), parameter
    assert len(kinds) <= 1, "the loader takes one way of storing experts at a time"


@pytest.mark.parametrize("load", ["model", "mtp"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ["0.8B", "27B", "35B-A3B"])
def test_vllm_finds_every_parameter_of_the_published_models(size, layout, load):
    config = json.loads((CONFIGS / f"{size}.json").read_text())
    assert_loads(disk_shapes(published_shapes(size), layout), config, load)


@pytest.mark.parametrize("kind", [{"moe": True}, {"moe": False, "tied": True}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vllm_finds_every_parameter_of_an_export(tmp_path, layout, kind):
    """Of a model trained without MTP, which comes from the source. A lost tensor is noticed."""
    folder = write_folder(tmp_path / "hf", layout=layout, shard_size=60_000, **kind)
    config = json.loads((folder / "config.json").read_text())
    trained = build(config, mtp=False, seed=1)
    save_hf(MemorySource({n: p.detach() for n, p in trained.named_parameters()}), folder, tmp_path / "out")
    names = list(HFFolder(tmp_path / "out").specs)
    for load in ("model", "mtp"):
        assert_loads(names, config, load)
    for lost in ("model.language_model.layers.3.self_attn.k_proj.weight", "model.visual.blocks.1.attn.qkv.bias"):
        assert lost in names
        with pytest.raises(AssertionError):
            assert_loads([name for name in names if name != lost], config, "model")
