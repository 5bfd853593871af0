"""The model against transformers' own classes: logits and the gradient of every parameter."""

import pytest
import torch
from peer import config_dict, forward_aux, pack, pair, peer_inputs, random_model, sample, text_only

from qwen35.checkpoint.hf_names import text_only_name
from qwen35.model import Qwen35, load_config
from qwen35.model.linear import recomputed_linear

LOGITS, GRADIENTS = 1e-5, 5e-5  # relative norm error

TEXT = [sample([70])]
IMAGES = [sample([5, (4, 4), 3, (2, 6), 7]), sample([(8, 4), 9], seed=1)]
VIDEO = [sample([4, (3, 4, 6), 8])]
TEXTS = [*TEXT, sample([41], seed=2), sample([1], seed=4)]
THREE = [sample([66], seed=2), sample([3, (4, 2), 40], seed=3), sample([1], seed=4)]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(
        (ours.detach().double() - theirs.detach().double()).norm() / theirs.detach().double().norm().clamp(min=1e-12)
    )


def compare(config: dict, samples: list, idle_experts: bool = False) -> None:
    """One packed run of ours against one run of transformers per sequence."""
    ours, theirs = pair(config)
    if idle_experts:  # the router can only choose experts 0 and 1
        for model in (ours, theirs):
            for name, p in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    p.data[2:] = 0
                    p.data[:2] = p.data[:2].abs() * 50
    logits = ours.logits(pack(samples))
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * probe).sum().backward()
    is_text_only = config["model_type"].endswith("_text")
    inputs = [peer_inputs(s) for s in samples]
    if is_text_only:  # of which no token is an image's
        inputs = [{"input_ids": one["input_ids"]} for one in inputs]
    reference = torch.cat([theirs(**one).logits[0] for one in inputs])
    (reference * probe).sum().backward()
    assert error(logits, reference) <= LOGITS
    gradients = {text_only_name(n) if is_text_only else n: p for n, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        mine = gradients.pop(name).grad
        if p.grad is None or not p.grad.any():
            assert mine is None or not mine.any(), f"{name}: transformers has no gradient, we have one"
        else:
            assert error(mine, p.grad) <= GRADIENTS, f"{name}: {error(mine, p.grad):.1e}"
    assert not gradients, f"parameters that transformers lacks: {list(gradients)}"


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("samples", [TEXT, IMAGES, VIDEO, THREE], ids=["text", "images", "video", "packed"])
def test_equals_transformers(moe, samples):
    compare(config_dict(moe=moe), samples)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("samples", [TEXT, TEXTS], ids=["text", "packed"])
def test_a_text_only_model_equals_transformers(moe, tied, samples):
    compare(text_only(config_dict(moe=moe, tied=tied)), samples)


YARN = {"mrope_section": [2, 1, 1], "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("samples", [TEXT, IMAGES, TEXTS], ids=["text", "images", "packed"])
@pytest.mark.parametrize("length", [16, 1024], ids=["far beyond", "in between"])
def test_yarn_equals_transformers(moe, samples, length):
    config = config_dict(moe=moe, rope_parameters=YARN | {"original_max_position_embeddings": length})
    compare(config if samples is IMAGES else text_only(config), samples)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_tied_head_equals_transformers(moe):
    compare(config_dict(moe=moe, tied=True), IMAGES)


@pytest.mark.parametrize("value_heads_a_key_head", [1, 2, 3, 4])
def test_value_heads_share_key_heads(value_heads_a_key_head):
    compare(config_dict(moe=False, key_heads=2, value_heads=2 * value_heads_a_key_head), THREE)


def test_idle_experts_get_no_gradient():
    compare(config_dict(), IMAGES, idle_experts=True)


def test_packed_equals_separate():
    ours = random_model(config_dict())
    samples = [*IMAGES, *THREE]
    packed = ours.logits(pack(samples))
    probe = torch.randn_like(packed)
    (packed * probe).sum().backward()
    gradients = {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    separate = torch.cat([ours.logits(s) for s in samples])
    (separate * probe).sum().backward()
    assert error(packed, separate) <= LOGITS
    for name, p in ours.named_parameters():
        assert error(gradients[name], p.grad) <= GRADIENTS, name


def test_images_change_the_logits_of_later_text():
    """Guards the tests above: image features do reach the text after them."""
    ours = random_model(config_dict())
    s = sample([5, (4, 4), 3])
    before = ours.logits(s)
    s.pixel_values.mul_(-1)
    assert error(ours.logits(s)[-1], before[-1]) > 1e-3


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_bf16_rounds_no_worse_than_transformers(moe):
    config, samples = config_dict(moe=moe), [sample([40, (4, 4), 60], seed=s) for s in range(3)]
    exact = random_model(config)
    ours, theirs = pair(config, torch.bfloat16)
    with torch.no_grad():
        truth = exact.logits(pack(samples))
        reference = torch.cat([theirs(**peer_inputs(s)).logits[0] for s in samples])
        assert error(ours.logits(pack(samples)), truth) <= 2 * error(reference, truth)


def peer_aux_loss(theirs, s):
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

    out = theirs(**peer_inputs(s), output_router_logits=True)
    if not torch.allclose(out.router_logits[0].sum(-1), torch.ones(())):
        return out.aux_loss
    # transformers 5.2 passes probabilities to its formula as if they were logits; pass logarithms
    text = theirs.config.text_config
    logits = tuple(p.log() for p in out.router_logits)
    return load_balancing_loss_func(logits, text.num_experts, text.num_experts_per_tok)


def test_aux_loss_equals_transformers():
    ours, theirs = pair(config_dict())
    s = sample([50, (4, 4), 30])
    _, aux = forward_aux(ours, s)
    reference = peer_aux_loss(theirs, s)
    assert error(aux, reference) <= 1e-6
    aux.backward()
    reference.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.grad is not None and gradients[name].grad is not None and gradients[name].grad.any():
            assert error(p.grad, gradients[name].grad) <= GRADIENTS, name
    assert ours.model.language_model.layers[0].mlp.gate.weight.grad.any()


def test_pad_tokens_are_left_out_of_the_aux_loss():
    import dataclasses

    ours = random_model(config_dict())
    real, tail = sample([40]), sample([13], seed=9)
    is_pad = torch.arange(53) >= 40
    _, aux = forward_aux(ours, dataclasses.replace(pack([real, tail]), is_pad=is_pad))
    _, alone = forward_aux(ours, real)
    assert error(aux, alone) <= 1e-6


def test_the_vision_tower_is_in_the_graph_without_images():
    """A sharded run's collectives must not depend on the data: gradients exist and are zero."""
    ours = random_model(config_dict())
    ours.logits(sample([20])).sum().backward()
    for name, p in ours.model.visual.named_parameters():
        assert p.grad is not None and not p.grad.any(), name


def test_a_dummy_image_changes_nothing():
    import dataclasses

    ours = random_model(config_dict())
    s = sample([5, (4, 4), 3])
    dummy = torch.zeros(8, s.pixel_values.shape[1])
    padded = dataclasses.replace(
        s, pixel_values=torch.cat([s.pixel_values, dummy]), grid_thw=torch.cat([s.grid_thw, torch.tensor([[1, 2, 4]])])
    )
    assert error(ours.logits(padded), ours.logits(s)) <= 1e-6


def test_too_few_image_features_are_an_error():
    import dataclasses

    ours = random_model(config_dict())
    s = sample([5, (4, 4), 3])
    with pytest.raises(ValueError, match="4 image tokens in input_ids, but grid_thw gives only 1 features"):
        ours(dataclasses.replace(s, grid_thw=torch.tensor([[1, 2, 2]]), pixel_values=s.pixel_values[:4]))


def test_recompute_gives_the_same_gradients():
    ours = random_model(config_dict())
    batch = pack(IMAGES)
    results = []
    for recompute in (False, True):
        ours.zero_grad()
        ours.recompute(recompute)
        hidden, aux = forward_aux(ours, batch)
        (hidden.square().sum() + aux).backward()
        results.append({n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[1]) and results[0].keys() == results[1].keys()


def test_random_weights_follow_the_seed():
    a, b, c = (Qwen35.from_config(config_dict(), seed=s) for s in (3, 3, 4))
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        if name.endswith(("proj.weight", "A_log", "gate_up_proj")):
            assert not torch.equal(x, z), name
    assert torch.equal(a.model.language_model.norm.weight, torch.zeros(48))
    assert torch.equal(a.model.visual.merger.norm.weight, torch.ones(32))


@pytest.mark.parametrize("trained", ["q_norm", "k_norm", "q_proj", "v_proj"])
def test_gradients_if_only_q_or_only_k_is_trained(trained):
    """q and k are recomputed in backward; one of them may not need a gradient."""
    model, batch = Qwen35.from_config(config_dict(), seed=3), pack([sample([20], seed=1)])
    gradients = []
    for alone in (False, True):
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not alone or (name.endswith(f"{trained}.weight")))
        model(batch).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if n.endswith(f"{trained}.weight")})
    assert gradients[0] and all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_multi_token_prediction_equals_its_definition():
    """norm(layer(fc([norm(embedding of t+1); norm(hidden of t)]))), with the module's layer."""
    config = load_config(config_dict(moe=True))
    model = Qwen35(config, mtp=True)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    s = sample([30])
    mtp, text = model.mtp, model.model.language_model
    hidden = model(s)
    following = text.embed_tokens(s.input_ids.roll(-1))
    rope = text.rope(s.position_ids)
    out, _ = mtp(hidden, following, rope, s.cu_seqlens, torch.ones(len(hidden)))

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)

    both = [norm(following, mtp.pre_fc_norm_embedding.weight), norm(hidden, mtp.pre_fc_norm_hidden.weight)]
    x, _ = mtp.layers[0](torch.cat(both, -1) @ mtp.fc.weight.T, rope, s.cu_seqlens, torch.ones(len(hidden)))
    assert error(out, norm(x, mtp.norm.weight)) <= 1e-6


def test_recomputed_linear_saves_only_its_inputs():
    """All inputs get gradients, except frozen ones; only the inputs are saved."""
    d = {"dtype": torch.float64, "requires_grad": True}
    x, y, weight = torch.randn(5, 4, **d), torch.randn(5, 1, **d), torch.randn(3, 4, **d)
    assert torch.autograd.gradcheck(lambda w, *a: recomputed_linear(lambda x, y: x.sin() * y, w, *a), (weight, x, y))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = recomputed_linear(lambda x, y: x.sin() * y, weight.detach(), x.detach(), y)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (weight, x, y)}
    out.sum().backward()
    assert x.grad is None and weight.grad is None
    assert torch.allclose(y.grad[:, 0], (x.sin() @ weight.T).sum(1))
