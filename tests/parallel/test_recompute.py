"""Activation checkpointing: bit-equal gradients, what runs twice, and how much is saved."""

import dataclasses
import functools

import pytest
import torch
from live_bytes import LiveBytes
from peer import config_dict, pack, sample

from kernels import gated_delta_rule, native
from kernels.recompute_cache import RecomputeCache
from qwen35.config.load import SettingError, load_settings
from qwen35.model import Qwen35
from qwen35.training.loss import token_weights

BATCH = pack([sample([9, (4, 4), 60], seed=0), sample([130], seed=1), sample([1], seed=2)])


def step(model: Qwen35, recompute: bool | str, batch=BATCH) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.recompute(recompute)
    loss, aux, _ = model.loss(batch, token_weights(batch, "default"))
    (loss + 0.1 * aux).backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_the_same_to_the_bit(dtype):
    model = Qwen35.from_config(config_dict(), seed=3).to(dtype)
    batch = dataclasses.replace(BATCH, pixel_values=BATCH.pixel_values.to(dtype))
    plain = step(model, False, batch)
    assert len(plain) == 1 + len(list(model.parameters()))
    for how in (True, "selective"):
        again = step(model, how, batch)
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain), how


@pytest.mark.parametrize(("how", "runs"), [(False, 1), (True, 2), ("selective", 1)], ids=["off", "on", "selective"])
def test_how_often_each_core_runs(how, runs, monkeypatch):
    """Counts text attention (the tower's is not causal) and the delta rule's outputs."""
    calls = {"attention": 0, "outputs": 0}
    plain_attention, plain_forward = native.attention, gated_delta_rule._forward

    def counted_attention(*args):
        calls["attention"] += args[4]  # causal
        return plain_attention(*args)

    def counted_forward(inputs, cu_seqlens, out, *rest):
        calls["outputs"] += out is not None
        return plain_forward(inputs, cu_seqlens, out, *rest)

    monkeypatch.setattr(native, "attention", counted_attention)
    monkeypatch.setattr(gated_delta_rule, "_forward", counted_forward)
    step(Qwen35.from_config(config_dict(), seed=3), how)
    assert calls["attention"] == runs and calls["outputs"] == 3 * runs


@functools.cache
def kept_bytes(layer_types: tuple[str, ...], how: bool | str) -> int:
    """The bytes alive between forward and backward."""
    config = config_dict(layer_types=list(layer_types), num_hidden_layers=len(layer_types))
    model, batch = Qwen35.from_config(config, seed=3), pack([sample([512], seed=1)])
    step(model, how, batch)  # computes what is made once, such as the batch's derived fields
    model.zero_grad()
    weights = token_weights(batch, "default")
    with LiveBytes() as live:
        loss, aux, _ = model.loss(batch, weights)
        total = loss + aux
        held = live.now
        total.backward()
        model.zero_grad()
        del loss, aux, total
    assert live.now < 4096  # all is freed, so all was tracked
    return held


@pytest.mark.parametrize(
    ("kind", "core"),
    [("linear_attention", 4 * 24 * 4), ("full_attention", 4 * 32 * 4 + 4 * 4)],  # o, and the softmax's statistics
)
def test_bytes_saved_per_layer(kind, core):
    """Per token: the layer's input with recompute, with selective also its core's output."""
    base = ("linear_attention", "full_attention")
    kept = {how: (kept_bytes((*base, kind), how) - kept_bytes(base, how)) / 512 for how in (False, True, "selective")}
    token, small = 48 * 4, 2  # bytes of a token's hidden state; slack for what does not depend on the tokens
    assert token <= kept[True] <= token + small
    if native.HAS_GROUPED_FLASH or kind == "linear_attention":
        assert token + core <= kept["selective"] <= token + core + small
    assert kept[False] > 3 * kept["selective"]


def test_the_recompute_cache_returns_results_in_order_and_once():
    recompute_cache, made = RecomputeCache(), []

    def make():
        made.append(len(made))
        return made[-1]

    first, second = recompute_cache.contexts()
    with first:
        assert [recompute_cache.once(make), recompute_cache.once(make)] == [0, 1]
    with second:
        assert [recompute_cache.once(make), recompute_cache.once(make)] == [0, 1]
        with pytest.raises(IndexError):
            recompute_cache.once(make)
    assert made == [0, 1]


def test_the_recompute_setting(tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(
        "data: {dataset_param: {basic_parameters: {dataset: x}}}\nmodel: {model_name_or_path: m}\n"
        "training: {train_iters: 1, save: s, init_from_hf_path: m}\n"
    )
    for text, value in (("true", True), ("false", False), ("selective", "selective")):
        assert load_settings(recipe, [f"parallel.recompute={text}"]).parallel.recompute is value or value == text
    for text in ("selectiv", "null", "1", "[selective]"):
        with pytest.raises(
            SettingError, match=r"^parallel\.recompute: .* is not of type bool and is not one of 'selective'$"
        ):
            load_settings(recipe, [f"parallel.recompute={text}"])
    for op in ("gated_delta_rule", "chunk_gated_delta_rule"):
        with pytest.raises(SettingError, match="selective means nothing to fla's delta rule"):
            load_settings(recipe, ["parallel.recompute=selective", f"model.kernels.{op}=fla"])
        load_settings(recipe, ["parallel.recompute=true", f"model.kernels.{op}=fla"])
