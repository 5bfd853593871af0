"""PEFT's adapter folders against peft itself: both ways, byte for byte, and the same outputs."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import MemorySource, assert_same_bytes
from peer import config_dict, pair, peer_inputs, sample, text_only
from safetensors.torch import load_file, save_file

from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf_names import pair_of, shapes_of
from qwen35.checkpoint.merged import Merged
from qwen35.checkpoint.peft_folder import PeftFolder, write_peft
from qwen35.checkpoint.slices import TensorSlice, pieces
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import LoraSpec

# of hidden size 40, so that no stacked weight is square, and the width of every pair tells A from B
SIZES = {"hidden_size": 40, "moe_intermediate_size": 24}
SPEC = LoraSpec(8, 16.0, (), (), (), 8, use_rslora=False)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(moe: bool) -> dict:
    made = config_dict(moe, **(SIZES if moe else {"hidden_size": 40}))
    return made | {"vision_config": made["vision_config"] | {"out_hidden_size": 40}}


def shapes(moe: bool = True) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(Qwen35(load_config(config(moe))).named_parameters())


def adapters(base: dict, spec: LoraSpec, chosen, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 adapters for the parameters that `chosen` takes."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, shape in base.items():
        if chosen(name):
            *stack, rows, columns = shape
            r = spec.expert_r if stack else spec.r
            for adapter, size in zip(pair_of(name), ((*stack, r, columns), (*stack, rows, r)), strict=True):
                made[adapter] = torch.randn(size, generator=generator) * 0.2
    return made


def read_all(source) -> dict[str, torch.Tensor]:
    return {name: source.read(name, TensorSlice.full(spec.shape)) for name, spec in source.specs.items()}


def written(tmp_path: Path, spec: LoraSpec = SPEC, chosen=None, base=None) -> Path:
    base = base or shapes()
    made = adapters(base, spec, chosen or (lambda n: n.endswith(("q_proj.weight", *EXPERTS))))
    write_peft(MemorySource(made), spec, base, "/base", tmp_path / "adapter")
    return tmp_path / "adapter"


LINEARS = tuple(f".{n}.weight" for n in "q_proj o_proj in_proj_qkv in_proj_z out_proj gate_proj down_proj".split())
CASES = {
    "dense": (False, SPEC, lambda n: n.endswith(LINEARS) and ".layers." in n),
    "rslora": (False, replace(SPEC, use_rslora=True), lambda n: n.endswith(LINEARS)),
    "moe": (True, SPEC, lambda n: n.endswith((*LINEARS, *EXPERTS))),
    "experts of another rank": (True, replace(SPEC, expert_r=4), lambda n: n.endswith((*LINEARS, *EXPERTS))),
    "the same, rslora": (
        True,
        replace(SPEC, expert_r=2, use_rslora=True),
        lambda n: n.endswith(("q_proj.weight", *EXPERTS)),
    ),
    "experts alone": (True, SPEC, lambda n: n.endswith(tuple(EXPERTS))),
    "gate_up alone": (True, SPEC, lambda n: n.endswith(("o_proj.weight", EXPERTS[0]))),
    "down alone": (True, SPEC, lambda n: n.endswith(EXPERTS[1])),
    "some layers": (True, SPEC, lambda n: ("layers.1." in n or "layers.3." in n) and n.endswith((*LINEARS, *EXPERTS))),
    "vision": (
        False,
        SPEC,
        lambda n: "visual." in n and n.endswith(("qkv.weight", "attn.proj.weight", "fc1.weight", "v_proj.weight")),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_written_and_answers_the_same(tmp_path, case):
    """As the merged weights do; and what PEFT saves again has the same bytes."""
    moe, spec, chosen = CASES[case]
    compare_with_peft(tmp_path, config(moe), spec, chosen, sample([5, (4, 4), 9]))


@pytest.mark.parametrize("case", ["dense", "rslora", "moe", "gate_up alone", "some layers"])
def test_peft_loads_it_into_the_text_only_class_of_a_text_only_model(tmp_path, case):
    moe, spec, chosen = CASES[case]
    compare_with_peft(tmp_path, text_only(config(moe)), spec, chosen, sample([19]))
    names = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert names and all(name.startswith("base_model.model.model.layers.") for name in names)


def compare_with_peft(tmp_path, config, spec, chosen, batch) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    is_text_only = config["model_type"].endswith("_text")
    inputs = {"input_ids": batch.input_ids[None]} if is_text_only else peer_inputs(batch)
    ours, theirs = pair(config)
    base = {name: p.detach() for name, p in ours.named_parameters()}
    made = adapters(shapes_of(base.items()), spec, chosen)
    shapes = shapes_of(base.items())
    summary = write_peft(MemorySource(made), spec, shapes, "/base", tmp_path / "ours", is_text_only)
    assert summary.tensors == len(made) and sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        ".qwen35.json", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    before = theirs(**inputs).logits[0]
    wrapped = PeftModel.from_pretrained(theirs, str(tmp_path / "ours"))
    assert_same_bytes(get_peft_model_state_dict(wrapped), load_file(tmp_path / "ours/adapter_model.safetensors"))
    merged = Merged(MemorySource(base), MemorySource(made), spec.scale)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(merged.read(name, TensorSlice.full(parameter.shape)))
    with torch.no_grad():
        own, wanted = ours.logits(batch), wrapped(**inputs).logits[0]
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
    assert (before - wanted).abs().max() > 0.01
    wrapped.save_pretrained(tmp_path / "theirs")
    source = PeftFolder(tmp_path / "theirs", shapes)
    assert_same_bytes(read_all(source), made)
    assert math.isclose(source.scale, spec.scale, rel_tol=1e-8)


def test_names_are_short_where_they_select_what_is_adapted(tmp_path):
    def config_of(chosen, base):
        folder = written(tmp_path, chosen=chosen, base=base)
        return json.loads((folder / "adapter_config.json").read_text())

    found = config_of(lambda n: n.endswith(("q_proj.weight", *EXPERTS)), shapes())
    assert (found["target_modules"], found["target_parameters"]) == (["q_proj"], sorted(EXPERTS))
    found = config_of(lambda n: "layers.1." in n and n.endswith(("out_proj.weight", EXPERTS[0])), shapes())
    assert found["target_modules"] == ["model.language_model.layers.1.linear_attn.out_proj"]
    assert found["target_parameters"] == ["model.language_model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("text_only", [False, True], ids=["the whole class", "the text-only class"])
def test_a_folder_that_peft_made_is_read(tmp_path, text_only):
    """And merged as PEFT merges it."""
    from peft import LoraConfig, get_peft_model
    from transformers.models import qwen3_5_moe

    ours, theirs = pair(config(moe=True))
    if text_only:
        text = qwen3_5_moe.Qwen3_5MoeForCausalLM(theirs.config.text_config)
        text.model, text.lm_head = theirs.model.language_model, theirs.lm_head
        theirs = text
    names = {"mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 4}
    made = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, init_lora_weights=False, target_modules=["q_proj", "out_proj", "up_proj"],
        target_parameters=list(names), rank_pattern=names, alpha_pattern=dict.fromkeys(names, 8), task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(theirs, made)
    wrapped.save_pretrained(tmp_path)
    base = {name: p.detach().clone() for name, p in ours.named_parameters()}
    source = PeftFolder(tmp_path, shapes_of(base.items()))
    assert source.scale == 2.0 and source.specs["model.language_model.layers.0.mlp.experts.down_lora_A"].shape == (
        8,
        4,
        24,
    )
    merged = Merged(MemorySource(base), source, source.scale)
    changed = 0
    for name, weight in wrapped.merge_and_unload().model.state_dict().items():
        ours_name = f"model.language_model.{name}" if text_only else f"model.{name}"
        own = merged.read(ours_name, TensorSlice.full(weight.shape))
        torch.testing.assert_close(own, weight, rtol=0, atol=1e-6)
        changed += not torch.equal(own, base[ours_name])
    assert changed == len(source.specs) / 2 == 16


def test_any_slice_of_an_adapter_is_read(tmp_path):
    source = PeftFolder(written(tmp_path, replace(SPEC, expert_r=4)), shapes())
    for name, whole in read_all(source).items():
        for limit in (4, 52, 300, 5000):
            for region in pieces(TensorSlice.full(whole.shape), 4, limit):
                assert torch.equal(source.read(name, region), whole[region.slices()]), (name, region)
        middle = TensorSlice(tuple(n // 3 for n in whole.shape), tuple(n // 2 for n in whole.shape))
        assert torch.equal(source.read(name, middle), whole[middle.slices()])


REFUSED = {
    "peft_type": (
        "IA3",
        r"peft_type: 'IA3' is not read here, only plain LoRA of linear modules and routed experts \(.*'LORA'",
    ),
    "task_type": ("SEQ_CLS", r"task_type: 'SEQ_CLS' is not read here"),
    "use_dora": (True, "use_dora: true is not read here"),
    "modules_to_save": (["lm_head"], r'modules_to_save: \["lm_head"\] is not read here'),
    "bias": ("all", 'bias: "all" is not read here'),
    "lora_bias": (True, "lora_bias: true is not"),
    "fan_in_fan_out": (True, "fan_in_fan_out: true is not"),
    "init_lora_weights": ("pissa", "init_lora_weights: 'pissa' is not read"),
    "trainable_token_indices": ([3], r"trainable_token_indices: \[3\] is not"),
    "layer_replication": ([[0, 4]], r"layer_replication: \[\[0, 4\]\] is not"),
    "something_of_next_year": ({"x": 1}, 'something_of_next_year: {"x": 1} is not'),
    "lora_alpha": ("many", "lora_alpha: 'many' is not read.*number"),
    "alpha_pattern": ({"q_proj|o_proj": 3}, r"alpha_pattern: 'q_proj\|o_proj' is not read.*pattern"),
    "target_parameters": (7, "target_parameters: 7 is not read"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_change_an_adapter_is_refused_by_name(tmp_path, key):
    folder, (value, words) = written(tmp_path), REFUSED[key]
    change(folder, **{key: value})
    with pytest.raises(CheckpointError, match=rf"^{folder}/adapter_config.json: {words}"):
        PeftFolder(folder, shapes())


def change(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(folder: Path, to) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t.contiguous() for n, t in to(tensors).items()}, folder / "adapter_model.safetensors")


def exchanged(tensors):
    """Experts as PEFT had them up to 0.18: A for the outputs of a weight, B for its inputs."""
    swapped = dict(tensors)
    for name, tensor in tensors.items():
        if ".experts." in name:
            swapped[re.sub("lora_([AB])", lambda m: "lora_" + "BA"["AB".index(m[1])], name)] = tensor.T
    return swapped


FIRST = "base_model.model.model.language_model.layers.3.self_attn.q_proj"
BROKEN = {
    "exchanged": (exchanged, r"16 tensors with A and B exchanged, as PEFT had those of experts up to 0.18"),
    "no B": (lambda t: {n: v for n, v in t.items() if n != f"{FIRST}.lora_B.weight"}, "1 tensor without the other of its pair"),
    "a bias": (lambda t: t | {f"{FIRST}.lora_B.bias": torch.zeros(3)}, "1 tensor not of an adapter of this model"),
    "DoRA's": (lambda t: t | {f"{FIRST}.lora_magnitude_vector": torch.zeros(3)}, "1 tensor not of an adapter"),
    "a module of others": (lambda t: t | {"base_model.model.x.lora_A.weight": torch.zeros(8, 4)}, "not of an adapter"),
    "an embedding": (lambda t: t | {f"{FIRST}.lora_embedding_A": torch.zeros(8, 4)}, "not of an adapter"),
    "a convolution": (
        lambda t: t | {f"{FIRST.replace('3.self_attn.q_proj', '0.linear_attn.conv1d')}.lora_A.weight": torch.zeros(8, 4)},
        "1 tensor not of an adapter of this model",
    ),
    "integers": (lambda t: t | {f"{FIRST}.lora_A.weight": torch.zeros(8, 40, dtype=torch.int64)}, "1 tensor not of an"),
    "another width": (lambda t: t | {f"{FIRST}.lora_A.weight": torch.zeros(8, 41)}, r"of shape \[8, 41\] instead of \[r, 40\]"),
    "other experts": (
        lambda t: {n: v[:-1] if ".experts.lora_A" in n and ".0." in n else v for n, v in t.items()},
        r"1 tensor of shape \[63, 24\] instead of \[8 x r, 24\]",
    ),
    "a rank that the config does not say": (
        lambda t: t | {f"{FIRST}.lora_A.weight": torch.ones(4, 40), f"{FIRST}.lora_B.weight": torch.ones(256, 4)},
        "2 tensors of rank 4, while adapter_config.json says 8: .*q_proj.lora_A",
    ),
    "twice, for both classes": (
        lambda t: t | {n.replace(".language_model.", "."): torch.ones_like(v) for n, v in t.items() if "q_proj" in n},
        "2 tensors there twice, under two names: .*layers.3.self_attn.q_proj.lora_A",
    ),
    "nothing": (lambda t: {}, "no adapters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_do_not_fit_are_one_line(tmp_path, case):
    folder, (to, words) = written(tmp_path), BROKEN[case]
    rewrite(folder, to)
    with pytest.raises(CheckpointError, match=words) as caught:
        PeftFolder(folder, shapes())
    assert "\n" not in str(caught.value)


def test_names_in_patterns_are_those_of_the_class_that_peft_wrapped(tmp_path):
    """Here the text-only class's; taken for none of the model, it would have the scale of all."""
    folder = written(tmp_path)
    rewrite(folder, lambda t: {n.replace(".language_model.", "."): v for n, v in t.items()})
    change(folder, alpha_pattern={"model.layers.3.self_attn.q_proj": 160})
    with pytest.raises(CheckpointError, match=r"scales of 2 in .* and 20 in .*layers.3.self_attn.q_proj.lora_A"):
        PeftFolder(folder, shapes())
    change(folder, alpha_pattern=None, rank_pattern={"model.layers.3.self_attn.q_proj": 4})
    with pytest.raises(
        CheckpointError, match=r"2 tensors of rank 8, while adapter_config.json says 4: .*layers.3.self"
    ):
        PeftFolder(folder, shapes())


def test_a_rank_that_only_the_config_has_is_refused(tmp_path):
    """PEFT does not load it, and vLLM takes the scale from it."""
    folder = written(tmp_path)
    change(folder, r=64)
    with pytest.raises(CheckpointError, match=r"18 tensors of rank 8, while adapter_config.json says 64"):
        PeftFolder(folder, shapes())


@pytest.mark.parametrize("version", ["0.18.1", "0.18.0.dev0@1a2b", None])
def test_square_experts_of_an_old_peft_are_refused(tmp_path, version):
    """Their shapes do not show that A and B are exchanged."""
    square = {"hidden_size": 32, "moe_intermediate_size": 16}
    made = config_dict(moe=True, **square)
    with torch.device("meta"):
        model = Qwen35(load_config(made | {"vision_config": made["vision_config"] | {"out_hidden_size": 32}}))
    base = shapes_of(model.named_parameters())
    folder = written(tmp_path, chosen=lambda n: n.endswith(EXPERTS[0]), base=base)
    for newer in ("0.19.0", "0.21.2", "1.0"):
        change(folder, peft_version=newer)
        assert len(PeftFolder(folder, base).specs) == 8
    rewrite(folder, exchanged)
    change(folder, peft_version=version)
    with pytest.raises(
        CheckpointError, match=r"8 tensors with A and B exchanged, as PEFT had those of experts up to 0.18"
    ):
        PeftFolder(folder, base)


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "new_embeddings.safetensors", "vit.safetensors", "x.pt"])
def test_weights_beside_an_adapter_are_refused(tmp_path, name):
    """Trained together with it; without them it is another model's."""
    folder = written(tmp_path)
    (folder / name).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=rf"^{folder}: weights beside adapter_model.safetensors .*: {name}; if they"
    ):
        PeftFolder(folder, shapes())


def test_what_else_lies_in_an_adapter_s_folder_is_told(tmp_path):
    folder = written(tmp_path)
    for name in (
        "README.md",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "trainer_state.json",
    ):
        (folder / name).write_bytes(b"")  # of a trainer
    assert len(PeftFolder(folder, shapes()).notes) == 1
    shutil.copytree(folder, folder / "reference")
    (folder / "additional_config.json").write_text("{}")
    _, line = PeftFolder(folder, shapes()).notes
    assert line == f"{folder}: not read: additional_config.json, reference/"
    (folder / "chat_template.jinja").write_text("")
    _, line = PeftFolder(folder, shapes()).notes
    assert line == (
        f"{folder}: not read: additional_config.json, chat_template.jinja, reference/; the tokenizer and the template are "
        "those of the recipe"
    )


def test_a_pickle_is_not_opened(tmp_path):
    folder = written(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match=r"no adapter_model.safetensors; adapters are read from safetensors alone"
    ):
        PeftFolder(folder, shapes())
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"adapter_config.json: not there"):
        PeftFolder(folder, shapes())


def test_dropout_is_harmless_and_said(tmp_path):
    folder = written(tmp_path)
    change(folder, lora_dropout=0.05, base_model_name_or_path=None)
    assert PeftFolder(folder, shapes()).notes == [
        f"adapters from {folder}, whose base is not named",
        f"{folder}: lora_dropout 0.05 is not used, as adapters have none here",
    ]


def test_a_folder_is_replaced_only_if_it_is_ours(tmp_path):
    folder = written(tmp_path)
    assert written(tmp_path) == folder
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"a file that this program did not write: notes.txt"):
        written(tmp_path)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a model; choose another folder"):
        written(tmp_path)
