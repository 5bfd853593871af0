"""Offloading on fake NPU tensors: the copies that are queued, and the peak of the device."""

import dataclasses
from math import ceil

import pytest
import torch
from live_bytes import LiveBytes
from steps import DEVICE, _fake, _to_bf16, make_batch, slice_config
from torch._subclasses.fake_tensor import FakeTensorMode
from watch import Watch

import kernels
from qwen35.batch import HOST_FIELDS, PackedBatch, map_fields
from qwen35.data.background import background_loader
from qwen35.model import Qwen35, load_config
from qwen35.parallel.activation_offload import Offload
from qwen35.parallel.fsdp import REPLICATED
from qwen35.training.adamw import SwappedAdamW
from qwen35.training.loss import token_weights

LAYERS = ["linear_attention"] * 2 + ["full_attention"]
TOKENS = 1024


class Copies(Watch):
    """Counts bytes between host and device each way; a copy that blocks the host is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.out = self.back = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            if {target.device.type, source.device.type} == {"npu", "cpu"}:
                assert args[2:] == (True,) or (kwargs or {}).get("non_blocking"), "the host waits"
                self.out += target.nbytes * (target.device.type == "cpu")
                self.back += target.nbytes * (target.device.type == "npu")
                return func(*args, **(kwargs or {}))
        self.calls.clear()  # they would keep their tensors alive
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Off: it would add an operator per new tensor."""


@pytest.mark.parametrize("recompute", [False, True, "selective"], ids=["", "recompute", "selective"])
def test_activations_on_the_host(recompute):
    """No host sync; what leaves returns; far less stays on the device until backward."""
    config, held = slice_config(True, LAYERS), {}
    batch = make_batch(config, TOKENS, True)
    weights = token_weights(batch, "default")
    for offload in (False, True):
        with FakeTensorMode() as mode, torch.device(DEVICE):
            fake, fake_weights = _fake(batch, mode), mode.from_tensor(weights)
            model = Qwen35(load_config(config), kernels=kernels.select("npu"))
            _to_bf16(model, REPLICATED)
            model.recompute(recompute)
            model.model.language_model.offload = Offload(torch.device(DEVICE)).stash if offload else None
            with LiveBytes("npu") as live, Copies() as copies:
                there = fake.to(DEVICE)
                there = dataclasses.replace(there, pixel_values=there.pixel_values.bfloat16())
                loss, aux, _ = model.loss(there, fake_weights.to(DEVICE, non_blocking=True))
                total = loss + aux
                held[offload] = live.now
                total.backward()
            assert not copies.record.wrong
            assert (copies.out == copies.back > 0) if offload else copies.out == 0
            del loss, aux, total, there
    sent = copies.out
    assert sent >= (len(LAYERS) - 1) * TOKENS * 1024 * 2  # inputs of all layers but the last
    assert held[False] - held[True] >= 0.95 * sent


class Made:
    """A stand-in for the decoding of packed sequences."""

    def __getitem__(self, bins: list[list[int]]) -> PackedBatch:
        return make_batch(slice_config(False, LAYERS), TOKENS, bins != [[0]])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_page_locked(workers):
    """Exactly what goes to the device, by the loader's thread with torch_npu's allocator."""
    batches = list(background_loader(Made(), [[[i]] for i in range(3)], workers, pin=True))
    for i, batch in enumerate(batches):
        wanted, locked = Made()[[[i]]], []
        map_fields(batch, lambda x, found=locked: found.append(x.is_pinned()) or x, skip=HOST_FIELDS)
        assert len(locked) > 10 and all(locked)
        assert torch.equal(batch.input_ids, wanted.input_ids) and torch.equal(batch.pixel_values, wanted.pixel_values)
        assert not any(getattr(batch, name).is_pinned() for name in ("cu_seqlens", "grid_thw"))
    assert len(batches) == 3


def test_moments_on_the_host():
    """No host sync; the moments go both ways; at most two chunks of them are on the device."""
    with FakeTensorMode(), torch.device(DEVICE):
        model = Qwen35(load_config(slice_config(True, LAYERS)), kernels=kernels.select("npu"))
        optimizer = SwappedAdamW([{"params": list(model.parameters())}], chunk=1 << 22, lr=1e-4)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        elements = sum(p.numel() for p in model.parameters())
        for state in optimizer.state.values():
            assert state["exp_avg"].device.type == state["exp_avg_sq"].device.type == "cpu"
            assert state["step"].device.type == "npu"
        with LiveBytes("npu") as live, Copies() as copies:
            optimizer.step()
        assert not copies.record.wrong and copies.out == copies.back == 2 * 4 * elements
        assert live.peak == 2 * 2 * 4 * (1 << 22) and live.now == 0
        chunks, trained = -(-elements // (1 << 22)), list(model.parameters())
        assert chunks <= copies.record.ops["aten::_fused_adamw_"] <= chunks + 1
        parts = sum(len(chunk) for chunk in optimizer._chunks(trained))
        assert copies.record.launched == 2 * parts + ceil(len(trained) / 48)  # the update and the step counters
