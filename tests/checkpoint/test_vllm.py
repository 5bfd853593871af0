"""Exports against vLLM's loaders: every parameter gets all of its parts, and adapters fit."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from checkpoint_cases import CONFIGS, DATA, MemorySource, build, published_shapes, write_folder
from hf_folder import LAYOUTS, stored_shapes
from peer import config_dict
from safetensors.torch import load_file

from qwen35.checkpoint.hf_names import pair_of, shapes_of
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.hf_write import save_hf
from qwen35.checkpoint.peft_folder import write_peft
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import LoraSpec, add_adapters, is_adapter

VLLM = json.loads((DATA / "vllm_names.json").read_text())
LORA = json.loads((DATA / "vllm_lora.json").read_text())
EXPERTS = VLLM["experts"]
PARTS = {part: whole for whole, parts in VLLM["parts"].items() for part in parts}


def expected(config: dict, load: str) -> set[str]:
    """The parameters of vLLM's model, or of its model of the multi-token-prediction layer."""
    known, text = VLLM["parameters"], config["text_config"]
    ffn = known["moe"] if "num_experts" in text else known["dense"]
    head = [] if config["tie_word_embeddings"] else ["lm_head.weight"]
    if load.startswith("mtp"):
        layer = [*known["norms"], *known["full_attention"], *ffn]
        return {*(f"model.{n}" for n in known["mtp"]), *(f"model.layers.0.{n}" for n in layer), *head}
    inner = ["embed_tokens.weight", "norm.weight"]
    for i, kind in enumerate(text["layer_types"]):
        inner += [f"layers.{i}.{n}" for n in (*known["norms"], *known[kind], *ffn)]
    language = {*(f"model.{n}" for n in inner), *head}
    if load == "model of text alone":
        return language
    blocks = [f"blocks.{i}.{n}" for i in range(config["vision_config"]["depth"]) for n in known["visual_block"]]
    return {f"visual.{n}" for n in (*known["visual"], *blocks)} | {f"language_model.{n}" for n in language}


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
    assert_loads(stored_shapes(published_shapes(size), layout), config, load)


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


# -- adapters --------------------------------------------------------------------------------------

TEXT = tuple("q_proj k_proj v_proj o_proj in_proj_qkv in_proj_z out_proj gate_proj up_proj down_proj".split())
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
SPECS = {
    "dense": (False, LoraSpec(8, 32.0, TEXT, (), (), 8, use_rslora=False)),
    "experts": (True, LoraSpec(8, 32.0, TEXT, BOTH, (), 8, use_rslora=False)),
    "of another rank": (True, LoraSpec(8, 32.0, TEXT, BOTH, (), 16, use_rslora=False)),
    "rslora": (True, LoraSpec(16, 32.0, TEXT, BOTH, (), 8, use_rslora=True)),
    "vision": (
        False,
        LoraSpec(8, 16.0, ("attn.qkv", "attn.proj", "linear_fc1", "linear_fc2"), (), (), 8, use_rslora=False),
    ),
}


def linears(config: dict, load: str = "model") -> Iterator[str]:
    """The modules of vLLM's model that adapters may name, with LoRA switched on."""
    for name in expected(config, load):
        module = name.removesuffix(".weight")
        if module.endswith("in_proj_qkvz"):
            yield from (module.replace("in_proj_qkvz", part) for part in LORA["in place of in_proj_qkvz"])
        else:
            yield re.sub(r"\.experts\.w(13|2)_weight$", ".experts", module)


@pytest.mark.parametrize("case", SPECS)
def test_vllm_takes_every_adapter_with_its_shape_and_scale(tmp_path, case):
    """It asserts both weights of experts, and has one scale, of r, whatever the experts' rank."""
    moe, spec = SPECS[case]
    config = config_dict(moe)
    model = Qwen35(load_config(config))
    add_adapters(model, spec)
    shapes = shapes_of((n, p) for n, p in model.named_parameters() if not is_adapter(n))
    generator = torch.Generator().manual_seed(0)
    mine = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters() if is_adapter(n)}
    write_peft(MemorySource(mine), spec, shapes, "/base", tmp_path / "adapter")
    loaded: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").items():
        assert name.startswith(LORA["prefix"])
        suffix = next(s for s in LORA["suffixes"] if name.endswith(s))
        module = name.removeprefix(LORA["prefix"]).removesuffix(suffix)
        prefix = next(p for p in VLLM["loads"]["model"]["prefixes"] if module.startswith(p))
        module = VLLM["loads"]["model"]["prefixes"][prefix] + module.removeprefix(prefix)
        loaded.setdefault(module, {})[LORA["suffixes"][suffix]] = tensor
    whole, known = {part: whole for whole, parts in LORA["packed"].items() for part in parts}, set(linears(config))
    assert len(loaded) == len(mine) / 2
    for module, pair in loaded.items():
        assert set(pair) == {"lora_a", "lora_b"}, module
        stem, _, leaf = module.removesuffix(".base_layer").rpartition(".")
        assert f"{stem}.{whole.get(leaf, leaf)}" in known, module
    values = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert all(values[key] is not None for key in LORA["config"]["required"])
    assert not any(values.get(key) for key in LORA["config"]["refused unless empty"])
    scale = values["lora_alpha"] / (math.sqrt(values["r"]) if values["use_rslora"] else values["r"])
    assert scale == pytest.approx(spec.scale)
    text = config["text_config"]
    for module in (m for m in loaded if moe and m.endswith(".experts")):
        sizes = {
            "E": text["num_experts"],
            "r": spec.expert_r,
            "H": text["hidden_size"],
            "I": text["moe_intermediate_size"],
        }
        for inner, rule in LORA["experts"].items():
            pair = loaded[f"{module}.{inner}" if inner else module]
            stack = {"w13": "gate_up_proj", "w2": "down_proj"}[rule["stack"]]
            name = f"model.{module.removeprefix('language_model.model.')}.{stack}".replace(
                "model.", "model.language_model.", 1
            )
            for side in ("lora_a", "lora_b"):
                assert list(pair[side].shape) == [product(size, sizes) for size in rule[side]], (module, inner, side)
            a, b, experts = pair["lora_a"], pair["lora_b"], sizes["E"]
            first, second = pair_of(name)
            assert torch.equal(a.reshape(experts, -1, a.shape[-1]), mine[first])
            assert torch.equal(b.reshape(b.shape[0], -1, experts).permute(2, 0, 1), mine[second])


def product(text: str, sizes: dict[str, int]) -> int:
    return math.prod(sizes[word] if word in sizes else int(word) for word in text.split(" * "))
