"""Adapters against peft on transformers' own classes: logits, the gradient of every adapter."""

import pytest
import torch
from peer import config_dict, pack, pair, peer_inputs, sample

from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.checkpoint.slices import TensorSlice
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import (
    LoraError,
    LoraSpec,
    adapted_by,
    adapters_off,
    add_adapters,
    initial_adapter,
    is_adapter,
)
from qwen35.training.adapters import InitialAdapters

LOGITS, GRADIENTS = 1e-5, 5e-5  # relative norm error
TEXT = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
VISION = ("attn.qkv", "attn.proj", "linear_fc1", "linear_fc2")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
IMAGES = [sample([5, (4, 4), 3, (2, 6), 7]), sample([(8, 4), 9], seed=1)]
PACKED = [sample([66], seed=2), sample([3, (4, 2), 40], seed=3), sample([1], seed=4)]


def spec_of(targets=TEXT, experts=(), exclude=(), r=8, alpha=16.0, expert_r=8, use_rslora=False) -> LoraSpec:
    return LoraSpec(r, alpha, targets, experts, exclude, expert_r, use_rslora)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(
        (ours.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm().clamp(min=1e-12)
    )


def peft_names(ours: Qwen35) -> dict[str, str]:
    """Our names of adapters -> peft's; of two wrappers around the experts the first is inside."""
    names = {}
    for name in saved_parameters(ours):
        before, _, kind = name.rpartition(".")
        is_inner = kind.startswith("gate_up") and hasattr(ours.get_submodule(before), "down_lora_A")
        names[name] = f"base_model.model.{before}.{'base_layer.' * is_inner}lora_{kind[-1]}.default.weight"
    return names


def to_peft(name: str, x: torch.Tensor) -> torch.Tensor:
    """Our tensor of an adapter as peft lays it out: the experts' in rows, or between columns."""
    if x.ndim == 2:
        return x
    return x.flatten(0, 1) if name.endswith("lora_A") else x.permute(1, 2, 0).flatten(1)


def with_peft(config: dict, spec: LoraSpec):
    """Our model and peft's, with the same weights and the same random adapters."""
    import peft

    ours, theirs = pair(config)
    add_adapters(ours, spec)
    made = peft.LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        use_rslora=spec.use_rslora,
        target_modules=list(spec.targets),
        target_parameters=list(spec.target_parameters) or None,
        exclude_modules=list(spec.exclude) or None,
    )
    theirs = peft.get_peft_model(theirs, made)
    generator, wanted, names = torch.Generator().manual_seed(3), dict(theirs.named_parameters()), peft_names(ours)
    with torch.no_grad():
        for name, p in saved_parameters(ours).items():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.06)
            wanted[names[name]].copy_(to_peft(name, p))
    assert {n for n, p in wanted.items() if p.requires_grad} == set(names.values())
    return ours, theirs


def compare(ours, theirs, samples: list) -> None:
    """One packed run of ours against one run of peft's for each sequence."""
    logits = ours.logits(pack(samples))
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * probe).sum().backward()
    reference = torch.cat([theirs(**peer_inputs(s)).logits[0] for s in samples])
    (reference * probe).sum().backward()
    assert error(logits, reference) <= LOGITS
    wanted, names = dict(theirs.named_parameters()), peft_names(ours)
    for name, p in ours.named_parameters():
        if not is_adapter(name):
            assert p.grad is None, name
            continue
        grad = wanted[names[name]].grad
        assert grad.any() and error(to_peft(name, p.grad), grad) <= GRADIENTS, name


@pytest.mark.parametrize("samples", [IMAGES, PACKED], ids=["images", "packed"])
@pytest.mark.parametrize(
    ("moe", "spec"),
    [
        (False, spec_of()),
        (False, spec_of((*TEXT, *VISION), exclude=("patch_embed.proj",), r=16, use_rslora=True)),
        (True, spec_of(experts=EXPERTS)),
        (True, spec_of(("in_proj_a", "shared_expert_gate"), EXPERTS[1:])),
        (True, spec_of((), EXPERTS[:1])),
    ],
    ids=["dense", "vision", "experts", "odd ones", "gate and up alone"],
)
def test_equals_peft(moe, spec, samples):
    compare(*with_peft(config_dict(moe=moe), spec), samples)


def test_idle_experts_get_no_gradient():
    """The router prefers experts 0 and 1."""
    ours, theirs = with_peft(config_dict(), spec_of(experts=EXPERTS))
    for model in (ours, theirs):
        for name, p in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                p.data[2:] = 0
                p.data[:2] = p.data[:2].abs() * 50
    compare(ours, theirs, IMAGES)
    for name, p in ours.named_parameters():
        if p.grad is not None and p.ndim == 3:
            assert any(not grad.any() for grad in p.grad), name


def merged(ours: Qwen35) -> Qwen35:
    """A plain model whose weights have the adapters in them."""
    plain, found = Qwen35(load_config(CONFIG)), dict(ours.named_parameters())
    scale = next(m.scale for m in ours.modules() if getattr(m, "scale", 0))
    weights = {n: p.detach().clone() for n, p in found.items() if not is_adapter(n)}
    for name in (n for n in found if n.endswith("lora_A")):
        target = adapted_by(name) + ".weight" * (found[name].ndim == 2)
        weights[target] += scale * found[f"{name[:-1]}B"] @ found[name]
    plain.load_state_dict(weights)
    return plain


CONFIG = config_dict()
ALL = spec_of((*TEXT, *VISION), EXPERTS, exclude=("patch_embed.proj",))


def filled(spec: LoraSpec = ALL, seed: int = 1, std: float = 0.06) -> Qwen35:
    model = Qwen35.from_config(CONFIG, seed=1)
    add_adapters(model, spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in saved_parameters(model).values():
            p.normal_(0, std, generator=generator)
    return model


def test_merged_weights_give_the_same():
    model = filled()
    with torch.no_grad():
        logits, batch = model.logits(pack(IMAGES)), pack(IMAGES)
        assert error(merged(model).logits(batch), logits) <= LOGITS
        base = Qwen35.from_config(CONFIG, seed=1).logits(batch)
        with adapters_off(model):
            assert torch.equal(model.logits(batch), base)
        assert error(base, logits) > 1e-2
        assert torch.equal(model.logits(batch), logits)


@pytest.mark.parametrize("how", [True, "selective"])
def test_recompute_gives_the_same_gradients(how):
    model, batch, results = filled(), pack(IMAGES), []
    for recompute in (False, how):
        model.zero_grad()
        model.recompute(recompute)
        model(batch).square().sum().backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() == saved_parameters(model).keys()
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_weight_gradients_of_what_is_frozen_are_not_computed():
    """No matrix product has the shape of a weight, no sum over tokens that of a norm or of taps."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() and func.overloadpacket in PRODUCTS:
                shapes.add(tuple(out.shape))
            return out

    names = ("mm", "addmm", "bmm", "_grouped_mm", "sum")  # torch 2.7 has no grouped one
    PRODUCTS = {getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)}
    model, batch = filled(), pack([sample([37, (4, 4), 12])])
    found = {}
    for trained in (False, True):
        shapes: set = set()
        for name, p in model.named_parameters():
            p.requires_grad_(trained or is_adapter(name))
        loss = model(batch).square().sum()
        with Seen():
            loss.backward()
        found[trained] = shapes
    frozen = {tuple(p.shape) for n, p in model.named_parameters() if not is_adapter(n) and p.ndim == 2}
    adapters = {tuple(p.shape) for n, p in model.named_parameters() if is_adapter(n)}
    assert len((found[True] & frozen) - adapters) > 5  # the check sees them where they are computed
    assert not (found[False] & frozen) - adapters
    assert not found[False] & {tuple(p.shape) for n, p in model.named_parameters() if n.endswith("norm.weight")}


def test_new_adapters_change_nothing_and_then_all_learn():
    """After the first step B alone has a gradient; from the second on every A has one, too."""
    model = Qwen35.from_config(CONFIG, seed=1)
    batch, base = pack(IMAGES), model(pack(IMAGES)).detach()
    add_adapters(model, ALL)
    new = InitialAdapters(saved_parameters(model), 7)
    with torch.no_grad():
        for name, p in saved_parameters(model).items():
            p.copy_(new.read(name, TensorSlice.full(p.shape)))
    assert torch.equal(model(batch), base)
    for step in range(2):
        model.zero_grad()
        model(batch).square().sum().backward()
        with torch.no_grad():
            for name, p in saved_parameters(model).items():
                assert bool(p.grad.any()) == (step > 0 or name.endswith("lora_B")), f"{name}, step {step + 1}"
                p -= 0.1 * p.grad


def test_initial_values_are_those_of_the_seed_and_of_no_layout():
    name, shape = "model.language_model.layers.3.mlp.experts.gate_up_lora_A", (8, 16, 48)
    new = InitialAdapters({name: torch.empty(shape)}, 7)
    whole = new.read(name, TensorSlice.full(shape))
    part = TensorSlice((2, 3, 7), (4, 5, 20))
    assert torch.equal(new.read(name, part), whole[part.slices()])
    assert new.read(name, TensorSlice((8, 0, 0), (0, 16, 48))).shape == (0, 16, 48)
    assert len({float(x) for x in whole[:, 0, 0]}) == 8 and whole.abs().max() <= 48**-0.5
    assert 0.9 < float(whole.std() * 3**0.5 * 48**0.5) < 1.1
    for other in (("x.lora_A", 7), (name, 8)):
        assert not torch.equal(initial_adapter(other[0], shape[1:], other[1], 0), whole[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_of(("q_proj", "qproj")), "qproj matches no linear module of this model; there are qkv, proj"),
        (spec_of(exclude=("visual.blocks",)), "visual.blocks matches no module of this model; there are qkv, proj"),
        (spec_of(("gate",)), r"layers\.0\.mlp\.gate can have no adapter: it is the router"),
        (spec_of(("conv1d",)), "conv1d can have no adapter: it is a convolution of four taps"),
        (
            spec_of(("proj",)),
            "patch_embed.proj can have no adapter: it is a convolution; leave it out, or name it in exclude_modules",
        ),
        (spec_of(("embed_tokens",)), "embed_tokens can have no adapter: it is an embedding"),
        (spec_of(("lm_head",)), "lm_head can have no adapter: it is the head"),
        (spec_of(("layers.{*}.input_layernorm",)), "input_layernorm can have no adapter: it is no linear map"),
        (
            spec_of(experts=("experts.up_proj",)),
            "matches no weight of routed experts of this model; there are gate_up_proj, down_proj",
        ),
        (spec_of(("o_proj",), exclude=("self_attn.*",)), r"self_attn\.\* leave no module with an adapter"),
    ],
)
def test_names_that_mean_nothing_are_errors(spec, message):
    with pytest.raises(LoraError, match=message):
        add_adapters(Qwen35(load_config(CONFIG)), spec)


def test_a_dense_model_has_no_experts_to_adapt():
    with pytest.raises(
        LoraError, match="gate_up_proj matches no weight of routed experts of this model; there are none"
    ):
        add_adapters(Qwen35(load_config(config_dict(moe=False))), spec_of(experts=EXPERTS))


def test_names_choose_whole_levels():
    model = Qwen35(load_config(CONFIG))
    spec = spec_of(
        ("layers.{*}.self_attn.*_proj", "mlp.down_proj", "shared_expert.*"),
        exclude=("layers.1.mlp.*.up_proj", "k_proj"),
    )
    with pytest.raises(LoraError, match=r"mlp\.down_proj matches no linear module"):
        add_adapters(model, spec)
    add_adapters(model, spec_of(spec.targets[::2], exclude=spec.exclude))
    adapted = {adapted_by(n).removeprefix("model.language_model.layers.") for n in saved_parameters(model)}
    shared = {f"{i}.mlp.shared_expert.{p}_proj" for i in range(4) for p in ("gate", "up", "down")}
    assert adapted == {"3.self_attn.q_proj", "3.self_attn.v_proj", "3.self_attn.o_proj", *shared} - {
        "1.mlp.shared_expert.up_proj"
    }
