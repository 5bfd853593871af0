"""Multi-token prediction: loss and every gradient against a slow reference, and that nothing
crosses a sequence's end.

The reference knows one plain sequence at a time: it takes transformers' own model for the trunk,
and writes the layer out.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peer import config_dict, forward_aux, pack, pair, peer_inputs, sample
from small_steps import run_of, settings_of
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from qwen35.batch import IGNORE, derive, mtp_labels
from qwen35.config.schema import LossCfg, ParallelSettings
from qwen35.model import Qwen35, load_config
from qwen35.parallel.fsdp import shard
from qwen35.parallel.mesh import make_meshes
from qwen35.train import train_step
from qwen35.training.flops import Flops
from qwen35.training.loss import make_mtp_targets, token_weights
from qwen35.training.metrics import SUMS

FACTOR, AUX = 0.3, 0.01


def masked(s, *trained):
    """A sample with labels at these positions only."""
    labels = torch.full_like(s.labels, IGNORE)
    labels[list(trained)] = s.labels[list(trained)]
    return dataclasses.replace(s, labels=labels)


SAMPLES = [
    masked(sample([9, (4, 4), 6], seed=0), 9, 10, 15, 16, 17, 18, 19),  # with an image's tokens among the inputs
    masked(sample([20], seed=1), *range(4, 19)),
    masked(sample([2], seed=2), 0),  # no token two ahead
    sample([1], seed=3),
    masked(sample([7], seed=4)),  # no labels
    sample([(2, 6), 8], seed=5),
]


def with_mtp(moe: bool, tied: bool = False) -> tuple[Qwen35, torch.nn.Module]:
    """Our model with the MTP layer and transformers' without it, with the same weights."""
    config = config_dict(moe=moe, tied=tied)
    plain, theirs = pair(config)
    ours = Qwen35(load_config(config), mtp=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in ours.mtp.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.06 if p.ndim > 1 else 0.1))
    ours.load_state_dict(plain.state_dict(), strict=False)
    return ours, theirs


# ── The reference ─────────────────────────────────────────────────────────────────────────────────


def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def layer(x, w, position_ids, text):
    """One sequence x [T, H] through a decoder layer with weights w, head by head, expert by expert.

    Returns y, the router's probabilities [T, E] (None if dense)."""
    T, D, heads, kv = len(x), text["head_dim"], text["num_attention_heads"], text["num_key_value_heads"]
    h = norm(x, w["input_layernorm.weight"])
    query, gate = (h @ w["self_attn.q_proj.weight"].T).view(T, heads, 2 * D).chunk(2, dim=-1)
    key, value = ((h @ w[f"self_attn.{name}_proj.weight"].T).view(T, kv, D) for name in "kv")
    query, key = norm(query, w["self_attn.q_norm.weight"]), norm(key, w["self_attn.k_norm.weight"])
    turned = D // 4
    angle = torch.empty(T, turned // 2)
    for i in range(turned // 2):  # sections [2, 1, 1]: time, height, width, time
        angle[:, i] = position_ids[(0, 1, 2, 0)[i]] * 10000.0 ** (-2 * i / turned)

    def turn(v):
        a, b, rest = v[..., : turned // 2], v[..., turned // 2 : turned], v[..., turned:]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    query, key = turn(query), turn(key)
    out = []
    for i in range(heads):
        j = i // (heads // kv)
        scores = (query[:, i] @ key[:, j].T / D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ value[:, j] * gate[:, i].sigmoid())
    x = x + torch.cat(out, dim=-1) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])

    def mlp(h, gate, up, down):
        return (F.silu(h @ gate.T) * (h @ up.T)) @ down.T

    def plain(name):
        return (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))

    if "mlp.gate.weight" not in w:
        return x + mlp(h, *plain("mlp")), None
    probabilities = (h @ w["mlp.gate.weight"].T).softmax(-1)
    weights, ids = probabilities.topk(2, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    shared = mlp(h, *plain("mlp.shared_expert")) * (h @ w["mlp.shared_expert_gate.weight"].T).sigmoid()
    routed = []
    for t in range(T):
        y = 0
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            gate, up = w["mlp.experts.gate_up_proj"][e].chunk(2)
            y = y + weight * mlp(h[t], gate, up, w["mlp.experts.down_proj"][e])
        routed.append(y)
    return x + shared + torch.stack(routed), probabilities


def reference(ours, theirs, samples, kind):
    """-> mean MTP loss by `kind`, the router's probabilities and choices summed over samples.

    In the graph of `theirs`, except for the layer's weights, which are ours."""
    text = config_dict()["text_config"]
    w = dict(ours.mtp.named_parameters())
    of_layer = {n.removeprefix("layers.0."): p for n, p in w.items() if n.startswith("layers.0.")}
    head = theirs.lm_head.weight
    losses, stats = [], []
    for s in samples:
        seen = {}
        hook = theirs.model.language_model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.update(x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        hidden = theirs.model(**peer_inputs(s)).last_hidden_state[0]
        hook.remove()
        embedded = seen["x"][0]  # with image features
        T = len(s.input_ids)
        if T < 2:
            continue
        both = [
            norm(embedded[1:], w["pre_fc_norm_embedding.weight"]),
            norm(hidden[:-1], w["pre_fc_norm_hidden.weight"]),
        ]
        x, probabilities = layer(torch.cat(both, -1) @ w["fc.weight"].T, of_layer, s.position_ids[:, :-1], text)
        logits = norm(x, w["norm.weight"]) @ head.T
        losses.append(
            F.cross_entropy(logits, s.labels[1:], ignore_index=IGNORE, reduction="none")[s.labels[1:] != IGNORE]
        )
        if probabilities is not None:
            chosen = F.one_hot(probabilities.topk(2).indices, probabilities.shape[-1]).sum((0, 1)).float()
            stats.append(torch.stack([probabilities.sum(0), chosen]))
    losses = [x for x in losses if len(x)]
    loss = {
        "default": lambda: torch.cat(losses).mean(),
        "per_sample_loss": lambda: torch.stack([x.mean() for x in losses]).mean(),
        "per_token_loss": lambda: torch.cat(losses).sum(),
    }[kind]()
    return loss, sum(stats) if stats else None


@pytest.mark.parametrize(
    ("moe", "tied", "kind", "recompute"),
    [
        (True, False, "default", False),
        (False, True, "per_sample_loss", True),
        (True, False, "per_token_loss", True),
    ],
)
def test_loss_and_every_gradient_equal_the_reference(moe, tied, kind, recompute):
    """Packed here, one sequence at a time there: layer, trunk, tower, embedding and head."""
    ours, theirs = with_mtp(moe, tied)
    theirs.train()
    batch = pack(SAMPLES)
    mtp_targets = make_mtp_targets(batch, kind)
    ours.model.language_model.recompute = recompute
    nothing = torch.zeros(len(batch.labels))
    loss, _, token_loss = ours.loss(batch, nothing, mtp_targets, FACTOR)
    wanted, stats = reference(ours, theirs, SAMPLES, kind)
    T = len(batch.labels)
    assert torch.isclose(loss, FACTOR * wanted, rtol=1e-5)
    assert torch.isclose((mtp_targets.weights * token_loss[T:]).sum(), wanted, rtol=1e-5)
    assert (token_loss[T:] > 0).nonzero().squeeze(1).tolist() == mtp_targets.label_positions.tolist()
    (loss / FACTOR).backward()
    mine = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    wanted.backward()
    own = {n: p.grad for n, p in ours.named_parameters() if n.startswith("mtp.")}
    shared = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert mine.keys() == {n for n, p in ours.named_parameters()}
    checked = 0
    for name, grad in mine.items():
        other = own.get(name, shared.get(name))
        if other is None:  # with one choice the last router's probabilities do not matter
            assert not grad.any(), name
            continue
        assert (grad - other).norm() <= 5e-5 * other.norm() + 1e-9, name
        checked += bool(other.any())
    assert checked >= len(mine) - 2
    if moe:  # its router is one more layer of the load-balancing loss, without the ends of sequences
        _, alone = forward_aux(ours, batch)
        assert stats[1].sum() == 2 * sum(len(s.labels) - 1 for s in SAMPLES)
        seen = []
        gate = ours.mtp.layers[0].mlp.gate
        hook = gate.register_forward_hook(lambda _, __, out: seen.append(out[2]))
        assert not torch.equal(ours.loss(batch, nothing, mtp_targets)[1], alone)
        hook.remove()
        assert torch.allclose(seen[0], stats, rtol=1e-4, atol=1e-5)


def test_the_next_token_loss_is_unchanged():
    """Both losses through one head equal two separate runs, in sum and each by itself."""
    ours, _ = with_mtp(True)
    batch = pack(SAMPLES)
    weights, mtp_targets = token_weights(batch, "default"), make_mtp_targets(batch, "default")
    loss, _, token_loss = ours.loss(batch, weights, mtp_targets, FACTOR)
    loss.backward()
    both = {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    plain, _, alone = ours.loss(batch, weights)
    further, _, _ = ours.loss(batch, torch.zeros_like(weights), mtp_targets, FACTOR)
    (plain + further).backward()
    assert torch.isclose(loss, plain + further)
    assert torch.equal(token_loss[: len(weights)], alone)
    for name, p in ours.named_parameters():
        assert (both[name] - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-9, name


# ── Boundaries, masks ─────────────────────────────────────────────────────────────────────────────


def test_targets_by_hand():
    """Two sequences and a pad tail: no label crosses a sequence or appears where there was none."""
    batch = pack([masked(sample([4], seed=1), 1, 2), sample([3], seed=2), masked(sample([2], seed=3))])
    batch.labels[3] = 99  # a stray label at the end of a sequence: no position has it as its target
    batch.labels[4] = 77  # a label at a sequence's start: two ahead of the previous sequence's end
    labels, is_end = mtp_labels(batch)
    ids = batch.input_ids
    assert is_end.tolist() == [False, False, False, True, False, False, True, False, True]
    assert labels.tolist() == [ids[2], ids[3], 99, -100, ids[6], -100, -100, -100, -100]
    mtp_targets = make_mtp_targets(batch, "per_sample_loss")
    assert mtp_targets.label_positions.tolist() == [0, 1, 2, 4]
    assert torch.allclose(mtp_targets.weights, torch.tensor([1 / 6, 1 / 6, 1 / 6, 0, 1 / 2, 0, 0, 0, 0]))


def test_nothing_crosses_a_sequence():
    """A packed sequence's two losses and gradients do not depend on its neighbours."""
    ours, _ = with_mtp(True)
    middle = sample([12], seed=9)
    results = []
    for first, last in ((3, 5), (30, 1)):
        batch = pack([sample([first], seed=first), middle, sample([last], seed=last)])
        mtp_targets = make_mtp_targets(batch, "default")
        here = slice(first, first + 12)
        only = torch.zeros(len(batch.labels))
        only[here] = 1 / 12
        mtp_targets = dataclasses.replace(mtp_targets, weights=only)
        ours.zero_grad()
        loss, _, token_loss = ours.loss(batch, only, mtp_targets)
        loss.backward()
        assert token_loss[len(only) :][here][:-2].all() and not token_loss[len(only) :][here][-2:].any()
        results.append((token_loss[len(only) :][here], {n: p.grad.clone() for n, p in ours.named_parameters()}))
    (a, grads), (b, others) = results
    assert torch.allclose(a, b, rtol=1e-5)
    for name, grad in grads.items():
        assert (grad - others[name]).norm() <= 1e-5 * grad.norm() + 1e-8, name


def test_inputs_of_the_layer():
    """The hidden states, and the next token's embedding or image feature; zeros at an end."""
    ours, _ = with_mtp(True)
    batch = derive(pack(SAMPLES), ours.config.vision_spec)
    seen = []
    ours.mtp.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    mtp_targets = make_mtp_targets(batch, "default")
    ours.loss(batch, token_weights(batch, "default"), mtp_targets)
    hidden, following = seen[0]
    embedded = ours.model.embed(batch)
    assert torch.equal(hidden, ours(batch))
    assert torch.equal(following[~mtp_targets.is_end], embedded[1:][~mtp_targets.is_end[:-1]])
    assert not following[mtp_targets.is_end].any()


@pytest.mark.parametrize("kind", ["default", "per_sample_loss", "per_token_loss"])
def test_one_token_answers_have_zero_loss(kind):
    """One-token answers at the start have no token two ahead: loss and gradients are 0, not NaN."""
    ours, _ = with_mtp(True)
    batch = pack([masked(sample([2], seed=1), 0), masked(sample([5], seed=2), 0)])
    mtp_targets = make_mtp_targets(batch, kind)
    assert not len(mtp_targets.label_positions) and not mtp_targets.weights.any()
    ours.loss(batch, token_weights(batch, kind), mtp_targets)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    assert not ours.mtp.fc.weight.grad.any() and ours.lm_head.weight.grad.any()


def test_the_layer_trains_on_a_frozen_trunk():
    """With a frozen trunk only the layer gets gradients."""
    ours, _ = with_mtp(False)
    ours.model.requires_grad_(False)
    ours.lm_head.requires_grad_(False)
    batch = pack(SAMPLES)
    ours.loss(batch, token_weights(batch, "default"), make_mtp_targets(batch, "default"))[0].backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        n for n, p in ours.named_parameters() if "mtp" in n
    }


def test_flops_of_the_layer():
    """One more attention layer, a projection from 2H to H, and the head for its labels."""
    for moe in (True, False):
        config = load_config(config_dict(moe=moe))
        lengths, images = torch.tensor([300, 200]), torch.zeros(0, 3, dtype=torch.long)
        types = (*config.text.layer_types, "full_attention")
        more = dataclasses.replace(config, text=dataclasses.replace(config.text, layer_types=types))
        with torch.device("meta"):
            one_more, found = Flops(Qwen35(more)), Flops(Qwen35(config, mtp=True))
        one_more, found = one_more.of(500, lengths, 180, images), found.of(500, lengths, 100, images, mtp_labels=80)
        assert found - one_more == 3 * 2 * 500 * 2 * 48 * 48


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_layer_is_an_fsdp_unit(alone):
    """Its weights are gathered for its forward and backward, not for the whole step."""
    with torch.device("meta"):
        model = Qwen35(load_config(config_dict()), mtp=True)
    shard(model, make_meshes("cpu", ParallelSettings()), torch.float32)
    assert isinstance(model.mtp, FSDPModule)
    replicated = [n for n, p in model.mtp.named_parameters() if not isinstance(p, DTensor)]
    assert replicated == ["layers.0.mlp.gate.weight"]


@pytest.mark.parametrize("kind", ["default", "per_sample_loss", "per_token_loss"])
def test_a_step_equals_the_formula(alone, kind):
    """Each loss is a mean over its labels in both micro-batches; gradients of their sum."""
    of_model = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": FACTOR, "loss_cfg": LossCfg(kind, AUX)}
    settings = settings_of(of_model, train_iters=1, clip_grad=0.0)
    ours, _ = with_mtp(True)
    # if the first token has a label, the two losses have different numbers of labels
    batches = [pack(SAMPLES), pack([masked(sample([9], seed=6), 0, 1, 2), masked(sample([5], seed=7), 0)])]
    parts, balance = {"loss": [], "mtp_loss": []}, []
    for batch in batches:
        T, mtp_targets = len(batch.labels), make_mtp_targets(batch, kind)
        seen = []  # inputs of the head
        norms = ours.model.language_model.norm, ours.mtp.norm
        hooks = [module.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out)) for module in norms]
        _, aux, _ = ours.loss(batch, torch.zeros(T), mtp_targets)
        for hook in hooks:
            hook.remove()
        balance.append(aux)
        for name, h, labels in zip(parts, seen, (batch.labels, mtp_targets.labels), strict=True):
            each = F.cross_entropy(h @ ours.head_weight.T, labels, ignore_index=IGNORE, reduction="none")
            lengths = batch.cu_seqlens.diff().tolist()
            samples = zip(each.split(lengths), labels.split(lengths), strict=True)
            parts[name].append([x[y != IGNORE] for x, y in samples])

    def mean(batches_of_samples):
        samples = [[x for x in of if len(x)] for of in batches_of_samples]
        if kind == "per_token_loss":
            return torch.cat([x for of in samples for x in of]).mean()
        if kind == "default":
            return sum(torch.cat(of).mean() for of in samples) / len(samples)
        return sum(torch.stack([x.mean() for x in of]).mean() for of in samples) / len(samples)

    wanted = {name: mean(of) for name, of in parts.items()}
    wanted["aux_loss"] = sum(balance) / 2
    (wanted["loss"] + FACTOR * wanted["mtp_loss"] + AUX * wanted["aux_loss"]).backward()
    norm = torch.stack([p.grad.norm() for p in ours.parameters()]).norm()
    ours.zero_grad()
    run = run_of(ours, settings, make_meshes("cpu", ParallelSettings()))
    record = train_step(run, [derive(batch, ours.config.vision_spec) for batch in batches], 0.0, 0.0)
    found = dict(zip((*SUMS, *record.also), record.sums.tolist(), strict=True))
    for name, value in wanted.items():
        assert found[name] == pytest.approx(float(value.detach()), rel=1e-5), name
    assert float(record.group_squares.sum().sqrt()) == pytest.approx(float(norm), rel=1e-5)
