"""A training step on fake NPU tensors: model, loss, backward, AdamW; also for transformers' model.

Shapes are those of slice S (hidden 1024, a real vocabulary), since fake tensors take no memory.
Weights are bf16 as FSDP passes them to the layers, replicated ones fp32; the optimizer is a run's,
in a step that may have had no images on any rank.

The delta rule, its convolution and its gated norm are Triton kernels, each launch a torch operator.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from watch import SavedBytes, Watch

import kernels.npu  # registers the device with torch
from qwen35.batch import HOST_FIELDS, PackedBatch, derive
from qwen35.model import Qwen35, load_config
from qwen35.parallel.context_parallel import apply_context_parallel, shard_batch
from qwen35.parallel.fsdp import REPLICATED
from qwen35.parallel.mesh import Meshes
from qwen35.training.adamw import AdamW
from qwen35.training.loss import make_mtp_targets, token_weights
from rehearse.operators import OperatorCounts

DEVICE = "npu:0"
PEER_GROUPS_EXPERTS = hasattr(F, "grouped_mm")  # else it syncs for each expert's rows; torch >= 2.10


# ── Our step ──────────────────────────────────────────────────────────────────────────────────────

SLICE = {  # overrides of the small config in tests/peer.py
    "vocab_size": 248_320,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
EXPERTS = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


def slice_config(moe: bool, layer_types: list[str]) -> dict:
    from peer import config_dict

    text = SLICE | (EXPERTS if moe else {"intermediate_size": 3584})
    config = config_dict(moe=moe, **text, layer_types=layer_types, num_hidden_layers=len(layer_types))
    config["text_config"]["rope_parameters"]["mrope_section"] = [11, 11, 10]
    config["vision_config"] |= {"out_hidden_size": 1024, "hidden_size": 144}  # heads of 72, as in the models
    return config


def make_batch(config: dict, tokens: int, images: bool) -> PackedBatch:
    """Two sequences and a pad tail, `tokens` in all, made on the host as in the collator."""
    from peer import pack, sample

    first = sample([100, (16, 24), 57] if images else [200])
    second = sample([(8, 8), 300, (4, 12, 8)] if images else [333], seed=1)
    tail = sample([tokens - len(first.input_ids) - len(second.input_ids)], seed=2)
    tail = dataclasses.replace(tail, labels=torch.full_like(tail.labels, -100))
    batch = pack([first, second, tail])
    positions, is_pad = (batch.labels != -100).nonzero()[:, 0], torch.arange(tokens) >= tokens - len(tail.input_ids)
    batch = dataclasses.replace(batch, is_pad=is_pad, label_positions=positions)
    return derive(batch, load_config(config).vision_spec)


@dataclasses.dataclass
class Step:
    forward: OperatorCounts
    backward: OperatorCounts
    optimizer: OperatorCounts
    saved: int | None  # bytes for backward, of what autograd keeps, where they are asked for
    calls: list
    model: Qwen35 | torch.nn.Module

    @property
    def wrong(self) -> list[str]:
        return [*self.forward.wrong, *self.backward.wrong, *self.optimizer.wrong]


def _fake(record, mode: FakeTensorMode):
    """The batch as fake CPU tensors; cu_seqlens and grid_thw keep their values."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    for name, value in fields.items():
        if dataclasses.is_dataclass(value):
            fields[name] = _fake(value, mode)
        elif isinstance(value, Tensor) and name not in HOST_FIELDS:
            fields[name] = mode.from_tensor(value)
        elif isinstance(value, Tensor):
            with unset_fake_temporarily():  # operators cache fake tensors on it, which belong to one mode
                fields[name] = value.clone()
    return dataclasses.replace(record, **fields)


def our_step(config: dict, batch: PackedBatch, *how: bool | str | Meshes, saves: bool = False) -> Step:
    """how: as of _ours."""
    with _ours(config, batch, *how) as (model, loss):
        return _run(model, loss, _optimizer(model), saves)


def bytes_kept(config: dict, batch: PackedBatch, recompute: bool | str) -> int:
    """What is there between forward and backward."""
    with _ours(config, batch, recompute) as (_, loss), LiveBytes("npu") as live:
        value = loss()
        held = live.now
        del value
        return held


@contextmanager
def _ours(
    config: dict, batch: PackedBatch, recompute: bool | str = False, mtp: bool = False, meshes: Meshes | None = None
) -> Iterator[tuple[Qwen35, Callable[[], Tensor]]]:
    """The model and its loss. meshes: of ranks that share the batch; they are the first rank's."""
    weights, mtp_targets = token_weights(batch, "default"), make_mtp_targets(batch, "default") if mtp else None
    if meshes:
        batch, weights, mtp_targets = shard_batch(batch, weights, mtp_targets, 0, meshes.ulysses_size)
    with FakeTensorMode() as mode, torch.device(DEVICE):
        batch, weights, mtp_targets = (
            _fake(batch, mode),
            mode.from_tensor(weights),
            mtp_targets and _fake(mtp_targets, mode),
        )
        model = Qwen35(load_config(config), kernels=kernels.select("npu"), mtp=mtp)
        if meshes:
            apply_context_parallel(model, meshes)
        _to_bf16(model, REPLICATED)
        model.recompute(recompute)

        def loss() -> Tensor:
            there = batch.to(DEVICE)
            there = dataclasses.replace(there, pixel_values=there.pixel_values.bfloat16())
            loss, aux, _ = model.loss(
                there, weights.to(DEVICE, non_blocking=True), mtp_targets and mtp_targets.to(DEVICE)
            )
            return loss + 0.001 * aux

        yield model, loss


def _optimizer(model: Qwen35) -> AdamW:
    """The run's optimizer, with parameters that may get no gradient; one dtype per group."""
    alike: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
    for name, p in model.named_parameters():
        alike.setdefault(("visual" in name, p.dtype), []).append(p)
    skip = torch.zeros((), device=DEVICE) == 0
    return AdamW([{"params": ps, "skip": skip if visual else None} for (visual, _), ps in alike.items()], lr=1e-4)


def _to_bf16(model: torch.nn.Module, but: tuple[str, ...] = ()) -> None:
    for name, parameter in model.named_parameters():
        if not name.endswith(but):
            parameter.data = parameter.data.bfloat16()


def _run(model: torch.nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, saves: bool) -> Step:
    saved = SavedBytes(model.parameters()) if saves else None
    if saved:
        with saved:  # in a separate run, because it adds operators
            loss()
    with Watch() as forward:
        value = loss()
    with Watch() as backward:
        value.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without, f"no gradient: {without}"
    for name, p in model.named_parameters():
        assert p.grad.shape == p.shape and p.grad.dtype == p.dtype and p.grad.device == p.device, name
    optimizer.step()  # the first call creates its state
    with Watch() as update:
        optimizer.step()
    calls = forward.calls + backward.calls
    return Step(forward.record, backward.record, update.record, saved and saved.total, calls, model)


# ── transformers' step ────────────────────────────────────────────────────────────────────────────


def peer_step(config: dict, tokens: int) -> Step:
    """transformers' text model on one sequence: sdpa, grouped_mm experts, torch delta rule."""
    from transformers.models import qwen3_5, qwen3_5_moe

    moe = config["model_type"] == "qwen3_5_moe"
    if moe:
        peer_config = qwen3_5_moe.Qwen3_5MoeTextConfig(**config["text_config"], experts_implementation="grouped_mm")
        make = qwen3_5_moe.Qwen3_5MoeTextModel
    else:
        peer_config, make = qwen3_5.Qwen3_5TextConfig(**config["text_config"]), qwen3_5.Qwen3_5TextModel
    peer_config._attn_implementation = "sdpa"
    with FakeTensorMode(), torch.device(DEVICE):
        model = make(peer_config)
        _to_bf16(model)
        ids = torch.zeros(1, tokens, dtype=torch.long, device=DEVICE)
        positions = torch.arange(tokens, device=DEVICE).expand(3, 1, -1)
        return _run(
            model,
            lambda: model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float().sum(),
            torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
            saves=True,
        )
