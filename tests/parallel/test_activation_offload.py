"""Activation offloading: bit-equal gradients, each storage copied once, no parameters."""

import dataclasses
import gc

import pytest
import torch
import torch.distributed as dist
from live_bytes import LiveBytes
from peer import config_dict
from test_recompute import BATCH, step
from torch.testing._internal.distributed.fake_pg import FakeStore

from qwen35.batch import derive
from qwen35.config.schema import ParallelSettings
from qwen35.device import CopyQueue
from qwen35.model import Qwen35
from qwen35.parallel.activation_offload import Offload, Stash, View
from qwen35.parallel.fsdp import shard
from qwen35.parallel.mesh import make_meshes
from qwen35.training.loss import token_weights
from qwen35.training.parameter_groups import freeze

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_gradients_are_the_same_to_the_bit(recompute, dtype):
    model = Qwen35.from_config(config_dict(), seed=3).to(dtype)
    batch = dataclasses.replace(BATCH, pixel_values=BATCH.pixel_values.to(dtype))
    plain = step(model, False, batch)
    for min_bytes in (0, 3000):
        model.model.language_model.offload = Offload(CPU, min_bytes).stash
        again = step(model, recompute, batch)
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain), min_bytes


class Counted(CopyQueue):
    """Logs what goes through the queues, in order."""

    def __init__(self, log: list) -> None:
        super().__init__(CPU)
        self.log = log

    def to_host(self, tensor):
        self.log.append(("to host", tensor.untyped_storage()._cdata, tensor.nbytes))
        return super().to_host(tensor)

    def to_device(self, tensor, device):
        self.log.append(("to device", 0, tensor.nbytes))
        return super().to_device(tensor, device)


def offloaded(model: Qwen35, log: list) -> None:
    offload = Offload(CPU, 100)  # cu_seqlens is smaller
    offload.to_host_queue, offload.to_device_queue = Counted(log), Counted(log)
    model.model.language_model.offload = offload.stash
    layers = model.model.language_model.layers
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, args, i=i: log.append(("run", i, 0)))


def test_order_of_the_copies():
    """With recompute, every layer's input but the last's leaves, and returns one layer ahead."""
    model, log = Qwen35.from_config(config_dict(), seed=3), []
    offloaded(model, log)
    step(model, True, derive(BATCH, model.config.vision_spec))
    size = len(BATCH.input_ids) * 48 * 4
    copies = [(what, n if what == "run" else size) for what, n, size in log]
    forward = [("run", 0), ("to host", size), ("run", 1), ("to host", size), ("run", 2), ("to host", size), ("run", 3)]
    backward = [
        ("to device", size),
        ("run", 3),
        ("to device", size),
        ("run", 2),
        ("to device", size),
        ("run", 1),
        ("run", 0),
    ]
    assert copies == forward + backward
    log.clear()
    step(model, "selective", derive(BATCH, model.config.vision_spec))
    tokens = len(BATCH.input_ids)
    sent = sum(size for what, _, size in log if what == "to host")
    assert sent == 3 * size + 3 * tokens * 4 * 24 * 4  # plus the outputs of the three delta rules


@pytest.mark.parametrize(("recompute", "kept"), [(True, 1), ("selective", 2)])
def test_unneeded_tensors_are_not_copied_back(recompute, kept):
    """Those of layers below all trained ones: the device would reuse their memory too early."""
    model, log = Qwen35.from_config(config_dict(), seed=3), []
    layers = "model.language_model.layers"
    freeze(model, ["model.visual", "model.language_model.embed_tokens", f"{layers}.0", f"{layers}.1"])
    offloaded(model, log)
    step(model, recompute, derive(BATCH, model.config.vision_spec))
    backward = [(what, key) for what, key, _ in log][[what for what, _, _ in log].index("to device") :]
    assert backward == [("to device", 0)] * kept + [("run", 3), ("run", 2)]  # of layer 2 only


def test_each_storage_is_copied_once_and_parameters_never():
    model, log = Qwen35.from_config(config_dict(), seed=3), []
    offloaded(model, log)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    loss, aux, _ = model.loss(BATCH, token_weights(BATCH, "default"))
    runs = [i for i, (what, _, _) in enumerate(log) if what == "run"]
    for start, end in zip(runs, [*runs[1:], len(log)], strict=True):
        sent = [key for what, key, _ in log[start:end] if what == "to host"]
        assert len(sent) == len(set(sent)) and not parameters & set(sent)
    assert all(what != "to host" for what, _, _ in log[runs[-1] :])
    (loss + aux).backward()
    sent, back = (sum(size for w, _, size in log if w == what) for what in ("to host", "to device"))
    assert sent == back > 0


def test_unsharded_fsdp_weights_are_not_offloaded():
    """They are parameters only while a layer runs; offloading them would cost extra copies."""
    sent = []
    for world in (1, 4):
        model, log = Qwen35.from_config(config_dict(), seed=3), []
        if world > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
            shard(model, make_meshes("cpu", ParallelSettings()), torch.float32)
        try:
            offloaded(model, log)
            model.loss(BATCH, token_weights(BATCH, "default"))
        finally:
            if world > 1:
                dist.destroy_process_group()
        sent.append([size for what, _, size in log if what == "to host"])
    assert sent[0] == sent[1] and len(sent[0]) > 20


def test_views_come_back_as_they_were():
    layer = torch.nn.Linear(2, 2)
    stash = Offload(CPU, 0).stash(layer, [], None, is_last=False)
    x = torch.arange(24.0).view(4, 6)
    views = [x[1:, ::2], x.T, x.view(2, 12)[1], x.view(torch.int32), layer.weight.T, torch.tensor(3.0)]
    with stash:
        packed = [stash.pack(v) for v in views]
    assert [isinstance(p, View) for p in packed] == [True] * 4 + [False, True]
    stash._release_device_memory()
    expected = [v.clone() for v in views]
    x.zero_()
    for p, v, e in zip(packed, views, expected, strict=True):
        found = stash.unpack(p)
        assert torch.equal(found, e) and found.dtype == v.dtype and found.stride() == v.stride()
    assert packed[0].item is packed[1].item is packed[2].item is not packed[3].item


def test_parameters_are_scanned_once_per_offloaded_storage():
    """Not for known storages: a layer packs dozens of tensors. Later parameters are found too."""
    looks = []

    class Layer(torch.nn.Linear):
        def parameters(self, recurse=True):
            looks.append(None)
            return super().parameters(recurse)

    layer = Layer(4, 4)
    stash = Offload(CPU, 0).stash(layer, [shared := torch.ones(4)], None, is_last=False)
    x, y = torch.ones(6, 4), torch.ones(6, 4)
    packed = [stash.pack(v) for v in (x, layer.weight, x.T, layer.bias, x[1:], shared, layer.weight.T, x)]
    assert [isinstance(p, View) for p in packed] == [True, False, True, False, True, False, False, True]
    assert len(looks) == 1
    assert isinstance(stash.pack(y), View) and len(looks) == 2
    layer.weight = torch.nn.Parameter(torch.ones(4, 4))
    assert not isinstance(stash.pack(layer.weight), View)


def test_nothing_outlives_backward():
    """Without the garbage collector: device memory must be freed at once."""
    model = Qwen35.from_config(config_dict(), seed=3)
    batch = derive(BATCH, model.config.vision_spec)
    model.model.language_model.offload = Offload(CPU, 0).stash
    weights = token_weights(batch, "default")
    gc.collect()
    gc.disable()
    try:
        for how in (False, True, "selective"):
            model.recompute(how)
            with LiveBytes() as live:
                loss, aux, _ = model.loss(batch, weights)
                total = loss + aux
                total.backward()
                model.zero_grad()
                del loss, aux, total
            assert live.now < 4096, how
            assert not any(type(x) is Stash for x in gc.get_objects())
    finally:
        gc.enable()
