"""The rows of the benchmark: each times our code and its yardstick, alternating in one process."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from bench import lora, slice_s
from bench.slice_s import BF16, Result, alternate, matmul_rate, packed, peak_bytes, peer_step, step
from kernels import native
from qwen35.batch import IGNORE
from qwen35.training.flops import Flops

# tokens of each sample, of which the last 40% have labels; the peer pads all to the longest
LLAVA_LIKE = (70, 110, 145, 175, 230, 314)


def slice_row(lengths: tuple[int, ...], trained: float, with_peer: bool) -> Result:
    batch = packed(lengths, trained)
    ours, theirs = slice_s.models(slice_s.VOCABULARY, with_peer)
    losses: dict[str, float] = {}
    calls: list[Callable[[], Any]] = [lambda: losses.update(ours=step(ours, batch))]
    if theirs is not None:
        calls.append(lambda: losses.update(peer=peer_step(theirs, batch)))
    seconds = alternate(calls, rounds=3)
    labels = int((batch.labels != IGNORE).sum())
    total = sum(lengths)
    flops = Flops(ours).of(total, batch.cu_seqlens.diff(), labels, batch.grid_thw)
    result = {"tokens_per_second": total / seconds[0], "share_of_matmul_rate": flops / seconds[0] / matmul_rate()}
    if theirs is None:
        return result | {"peak_gb": peak_bytes() / 1e9}
    if abs(losses["ours"] - losses["peer"]) > 0.02 * losses["peer"]:
        raise RuntimeError(f"ours and the peer do not compute the same: losses {losses}")
    return result | {"peer_tokens_per_second": total / seconds[1], "ratio": seconds[1] / seconds[0]}


def delta_rule() -> Result:
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule

    def inputs(tokens: int) -> list[Tensor]:
        q, k = (torch.randn(tokens, 16, 128).to(BF16) for _ in range(2))
        v, g, beta = torch.randn(tokens, 32, 128).to(BF16), -torch.rand(tokens, 32), torch.rand(tokens, 32)
        return [x.requires_grad_() for x in (q, k, v, g, beta)]

    def ours(x: list[Tensor]) -> None:
        cu_seqlens = torch.tensor([0, len(x[0])], dtype=torch.int32)
        q, k, v, g, beta = x
        out = kernels.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens)
        torch.autograd.grad(out, x, torch.ones_like(out))

    def theirs(x: list[Tensor]) -> None:
        q, k = (y.repeat_interleave(2, dim=1) for y in x[:2])
        wide = [y[None] for y in (q, k, *x[2:])]
        out = torch_chunk_gated_delta_rule(*wide, use_qk_l2norm_in_kernel=True)[0]
        torch.autograd.grad(out, x, torch.ones_like(out))

    short, long = inputs(4096), inputs(8192)
    once, peer, twice = alternate([lambda: ours(short), lambda: theirs(short), lambda: ours(long)], rounds=3)
    return {"seconds": once, "peer_seconds": peer, "ratio": peer / once, "time_8192_over_4096": twice / once}


def experts() -> Result:
    T, K, H, inner, E = 4096, 8, 1024, 512, 64
    ids = torch.rand(T, E).topk(K).indices
    weights = torch.rand(T, K, requires_grad=True)
    x, gate_up, down = (
        (torch.randn(shape) * 0.03).to(BF16).requires_grad_() for shape in ((T, H), (E, 2 * inner, H), (E, H, inner))
    )
    grad = torch.randn(T, H).to(BF16)
    rows, _, ends = native.permute(x.detach(), ids, E)
    wide, narrow = torch.randn(T * K, 2 * inner).to(BF16), torch.randn(T * K, inner).to(BF16)
    w1, w2 = gate_up.detach(), down.detach()

    def ours() -> None:
        y = kernels.moe_experts(x, ids, weights, gate_up, down)
        torch.autograd.grad(y, (x, weights, gate_up, down), grad)

    def matmuls() -> None:
        for matrix in (w1, w2):
            a, b = (rows, wide) if matrix is w1 else (narrow, rows)
            native.grouped_matmul(a, matrix.mT, ends)
            native.grouped_matmul(b, matrix, ends)
            native.grouped_weight_grad(b, a, ends)

    seconds, alone = alternate([ours, matmuls])
    return {"seconds": seconds, "matmul_seconds": alone, "ratio": seconds / alone}


def head() -> Result:
    T, D = 4096, 1024
    weight = torch.empty(slice_s.VOCABULARY, D, dtype=BF16).normal_(0, 0.03).requires_grad_()
    hidden = torch.randn(T, D).to(BF16).requires_grad_()
    labels, scale = torch.randint(0, slice_s.VOCABULARY, (T,)), torch.full((T,), 1 / T)
    w, h = weight.detach(), hidden.detach()

    def ours() -> None:
        loss, _ = kernels.linear_cross_entropy(hidden, weight, labels, scale)
        torch.autograd.grad(loss, (hidden, weight))

    def matmuls() -> None:
        for chunk in h.split(512):  # one matmul over all tokens would need 2 GB, and is not faster
            logits = chunk @ w.T
            logits @ w
            logits.T @ chunk

    before = peak_bytes()
    ours()
    needed = slice_s.VOCABULARY * D * (4 + 2) + T * D * 2  # one [V, D] in fp32, and the gradients
    extra = peak_bytes() - before - needed
    seconds, alone = alternate([ours, matmuls], rounds=3)
    return {"seconds": seconds, "matmul_seconds": alone, "ratio": seconds / alone, "extra_mb": extra / 1e6}


def saved_by_layers(model: nn.Module, forward: Callable[[], Any]) -> list[float]:
    """Bytes that each layer saves for backward: each storage once, and no parameters."""
    layers = list(model.get_submodule("model.language_model.layers").children())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[dict[int, Tensor]] = [{}]  # the first and last are for what is outside of the layers
    handles = [layer.register_forward_pre_hook(lambda *_: saved.append({})) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda *_: saved.append({})))

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage().data_ptr()
        if storage not in own and not any(storage in layer for layer in saved):
            saved[-1][storage] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graph = forward()
    for handle in handles:
        handle.remove()
    del graph  # alive until here, so that no address is used twice
    return [float(sum(x.untyped_storage().nbytes() for x in layer.values())) for layer in saved[1:-1]]


def saved() -> Result:
    """KB per token of the second layer (delta net) and the fourth (attention), experts included."""
    T = 512
    ours, theirs = slice_s.models(4096, with_peer=True)
    assert theirs is not None
    batch = packed((T,), 1.0)
    batch = replace(batch, input_ids=batch.input_ids % 4096)
    own = saved_by_layers(ours, lambda: ours(batch))
    peer = saved_by_layers(theirs, lambda: theirs.get_submodule("model")(input_ids=batch.input_ids[None]))
    results: Result = {}
    for kind, layer in (("delta_net", 1), ("attention", 3)):
        results[f"{kind}_kb"], results[f"peer_{kind}_kb"] = own[layer] / T / 1e3, peer[layer] / T / 1e3
        results[f"{kind}_ratio"] = own[layer] / peer[layer]
    return results


def llava_like() -> Result:
    result = slice_row(LLAVA_LIKE, 0.4, with_peer=True)
    trained = int((packed(LLAVA_LIKE, 0.4).labels != IGNORE).sum()) / sum(LLAVA_LIKE)
    names = {
        "tokens_per_second": "trained_tokens_per_second",
        "peer_tokens_per_second": "peer_trained_tokens_per_second",
    }
    return {names.get(k, k): v * trained if k in names else v for k, v in result.items()}


# name -> (measurement, target, whether it runs by default)
ROWS: dict[str, tuple[Callable[[], Result], str, bool]] = {
    "slice-2048": (lambda: slice_row((2048,), 1.0, True), "ratio >= 2 / 1.3, share >= 0.7 tuned", True),
    "slice-4096": (lambda: slice_row((4096,), 1.0, False), "peak <= 11 GB", True),
    "slice-4096-peer": (lambda: slice_row((4096,), 1.0, True), "ratio >= 3 / the peer does not fit", False),
    "slice-8192": (lambda: slice_row((8192,), 1.0, False), "peak <= 16 GB", False),
    "delta-rule": (delta_rule, "ratio >= 10 / 4, time_8192_over_4096 <= 2.2", True),
    "moe": (experts, "ratio <= 1.25", True),
    "cross-entropy": (head, "ratio <= 1.25, extra <= 400 MB", True),
    "saved": (saved, "ratios <= 0.3", True),
    "llava": (llava_like, "ratio >= 4 tuned", True),
    "lora": (lora.row, "ratio >= 2, memory_ratio <= 0.4", True),
}


def measure(name: str) -> Result:
    torch.manual_seed(0)
    F.linear(torch.ones(64, 64, dtype=BF16), torch.ones(64, 64, dtype=BF16))  # loads the matmul library
    load = os.getloadavg()[0]
    return {"row": name, "threads": torch.get_num_threads(), "load": load} | ROWS[name][0]()
