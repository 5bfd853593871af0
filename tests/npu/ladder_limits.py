"""rehearse/limits.py refuses what a 910B's operators refuse: valid calls, each with one error."""

import pytest
import torch
from bodies import install
from torch._subclasses.fake_tensor import FakeTensorMode
from watch import Watch

import kernels.npu
from kernels.decode import attention_step, causal_conv1d_step, gated_delta_rule_step
from rehearse.limits import RULES, problems

npu, aten = torch.ops.npu, torch.ops.aten
HALF = torch.bfloat16


def of(*shape, dtype=HALF):
    return torch.zeros(shape, dtype=dtype)


def ints(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


Q, KV, STATS = of(8, 4, 16), of(8, 2, 16), of(8, 4, 8, dtype=torch.float32)
MASK = torch.zeros(2048, 2048, dtype=torch.bool)
CALLS = {  # operator -> (valid arguments, [(change, message)])
    npu.npu_fusion_attention: (
        {"query": Q, "key": KV, "value": KV, "head_num": 4, "input_layout": "TND", "atten_mask": MASK, "sparse_mode": 3}
        | {"actual_seq_qlen": [3, 8], "actual_seq_kvlen": [3, 8]},
        [
            ({"query": Q.double()}, "query is torch.float64"),
            ({"value": KV.float()}, "value torch.float32"),
            ({"key": of(8, 3, 16), "value": of(8, 3, 16)}, "4 query heads over 3"),
            ({"query": of(8, 260, 16)}, "260 query heads"),
            ({"query": of(8, 4, 800), "key": of(8, 2, 800), "value": of(8, 2, 800)}, "heads of 800"),
            ({"actual_seq_qlen": [1] * 1025}, "1025 sequences"),
            ({"actual_seq_qlen": [8, 3]}, "decrease"),
            ({"atten_mask": MASK[:8, :8]}, "mask of sparse_mode 3"),
            ({"atten_mask": MASK.int()}, "atten_mask is torch.int32"),
            ({"key": KV[:, None]}, "axes of TND"),
            ({"value": of(8, 2, 32)}, "those of value are larger"),
            ({"key": of(8, 2, 8)}, "heads of query and key differ"),
            ({"query": of(2**20 + 1, 1, 1), "key": of(1, 1, 1), "value": of(1, 1, 1)}, "1048577 tokens"),
        ],
    ),
    npu.npu_fusion_attention_v3: (  # as torch_npu calls it for scaled_dot_product_attention
        {"query": of(3, 4, 5, 16), "key": of(3, 2, 9, 16), "value": of(3, 2, 9, 16), "head_num": 4}
        | {"input_layout": "BNSD", "atten_mask": MASK[None, None, :5, :9].expand(3, 1, 5, 9)},
        [
            ({"atten_mask": MASK[None, None, :1, :9].expand(3, 1, 1, 9)}, "a mask [3, 1, 1, 9], none of [[5, 9]"),
            ({"query": Q}, "axes of BNSD"),
        ],
    ),
    npu.npu_fusion_attention_grad: (
        {"query": Q, "key": KV, "value": KV, "dy": Q, "head_num": 4, "input_layout": "TND", "attention_in": Q}
        | {"softmax_max": STATS, "softmax_sum": STATS, "actual_seq_qlen": [8], "actual_seq_kvlen": [8]},
        [
            ({"dy": Q.float()}, "dy is not like"),
            ({"dy": Q[:4]}, "dy is not like"),
            ({"value": KV.float()}, "value torch.float32"),
            ({"softmax_max": STATS.bfloat16()}, "softmax_max is torch.bfloat16"),
            ({"softmax_sum": STATS[..., :1]}, "[T, N, 8]"),
            ({"query": of(8, 4, 600), "key": of(8, 2, 600), "value": of(8, 2, 600)}, "heads of 600"),
        ],
    ),
    npu.npu_grouped_matmul: (
        {
            "x": [of(6, 4)],
            "weight": [of(2, 4, 8)],
            "group_list": ints(2, dtype=torch.int64),
            "split_item": 2,
            "group_type": 0,
        },
        [
            ({"group_list": ints(2)}, "group_list is torch.int32"),
            ({"group_list": ints(1025, dtype=torch.int64)}, "1025 groups"),
            ({"group_list": ints(2, dtype=torch.int64).to("meta")}, "group_list is on meta"),
            ({"weight": [of(2, 4, 8).float()]}, "weight torch.float32"),
            ({"split_item": 0}, "split_item"),
            ({"x": [of(6, 8)[:, ::2]]}, "the rows of x are not contiguous"),
            ({"weight": [of(2, 4, 16)[..., ::2]]}, "weight is a strided view"),
            ({"x": [of(6, 4).double()]}, "x is torch.float64"),
            ({"x": [of(6, 2, 4)]}, "3 axes of x"),
            ({"x": [of(6, 70000)], "weight": [of(2, 70000, 8)]}, "an inner axis of 70000"),
            ({"weight": [of(2, 4, 65536)]}, "an inner axis of 65536"),
            ({"x": [of(6, 65536)], "weight": [of(2, 8, 65536).mT]}, "an inner axis of 65536"),
            ({"x": [of(4, 6)], "weight": [of(6, 8)], "group_type": 2}, "transposed view of its rows"),
            ({"x": [of(6, 4).T], "weight": [of(8, 6).T], "group_type": 2}, "weight is a strided view"),
            ({"x": [of(6, 65536).T], "weight": [of(6, 8)], "group_type": 2}, "an inner axis of 65536"),
        ],
    ),
    npu.npu_moe_token_permute: (
        {"tokens": of(6, 4), "indices": ints(6, 2, dtype=torch.int64)},
        [
            ({"tokens": of(6, 4, dtype=torch.float64)}, "tokens is"),
            ({"indices": ints(6, 2, dtype=torch.int16)}, "indices is"),
            ({"indices": ints(6, 600)}, "top_k of 600"),
            ({"indices": ints(5, 2)}, "shapes"),
        ],
    ),
    npu.npu_moe_token_permute_grad: (
        {"tokens": of(6, 4), "grad_permuted_tokens": of(12, 4), "indices": ints(6, 2), "sorted_indices": ints(12)},
        [
            ({"sorted_indices": ints(12, dtype=torch.int64)}, "sorted_indices is"),
            ({"sorted_indices": ints(11)}, "length"),
            ({"sorted_indices": ints(6, 2)}, "length"),
            ({"tokens": of(6, 4, dtype=torch.int8)}, "tokens is torch.int8"),
            ({"indices": ints(6, 600)}, "indices [6, 600]"),
            ({"grad_permuted_tokens": of(12, 4).float()}, "gradient's dtype"),
        ],
    ),
    npu.npu_moe_token_unpermute: (
        {"permuted_tokens": of(12, 4), "sorted_indices": ints(12), "probs": of(6, 2, dtype=torch.float32)},
        [
            ({"permuted_tokens": of(12, 4, dtype=torch.int8)}, "permuted_tokens is torch.int8"),
            ({"probs": of(6, 2, dtype=torch.float64)}, "probs is"),
            ({"probs": of(6, 600)}, "top_k of 600"),
            ({"sorted_indices": ints(11)}, "length"),
            ({"sorted_indices": ints(12, dtype=torch.int64)}, "sorted_indices is"),
        ],
    ),
    npu.npu_moe_token_unpermute_grad: (
        {
            "permuted_tokens": of(12, 4),
            "grad_unpermuted_tokens": of(6, 4),
            "sorted_indices": ints(12),
            "probs": of(6, 2, dtype=torch.float32),
        },
        [
            ({"permuted_tokens": of(12, 4, dtype=torch.int8)}, "permuted_tokens is torch.int8"),
            ({"grad_unpermuted_tokens": of(6, 4).float()}, "the gradient's dtype"),
            ({"grad_unpermuted_tokens": of(12, 4)}, "shapes"),
            ({"permuted_tokens": of(11, 4)}, "shapes"),
            ({"probs": of(6, 2, dtype=torch.float64)}, "probs is"),
            ({"sorted_indices": ints(12, dtype=torch.int64)}, "sorted_indices is"),
        ],
    ),
    npu.npu_swiglu: (
        {"input": of(6, 8)},  # rows of 16 bytes
        [
            ({"input": of(6, 8).double()}, "x is torch.float64"),
            ({"input": of(6, 7)}, "an axis of 7"),
            ({"input": of(8, 6).T}, "strided"),
            ({"input": of(0, 8)}, "empty"),
        ],
    ),
    npu.npu_swiglu_backward: (
        {"grad_output": of(6, 4), "input": of(6, 8)},
        [
            ({"grad_output": of(6, 4).float()}, "the gradient's dtype"),
            ({"grad_output": of(4, 6).T}, "strides"),
            ({"grad_output": of(6, 8)}, "a gradient [6, 8] for [6, 8]"),
            ({"input": of(8, 6).T}, "strided"),
        ],
    ),
    npu.npu_rms_norm: (
        {"input": of(8, 6).T, "gamma": of(8, dtype=torch.float32)},  # strided
        [
            ({"gamma": of(4)}, "gamma's shape"),
            ({"gamma": of(8, dtype=torch.float16)}, "gamma is torch.float16"),
            ({"input": of(6, 8).double()}, "input is torch.float64"),
            ({"input": of(*[1] * 8, 8)}, "gamma's shape"),
        ],
    ),
    npu.npu_gemma_rms_norm: (
        {"input": of(6, 8), "gamma": of(8)},
        [({"gamma": of(8, dtype=torch.float32)}, "gamma's dtype is not")],
    ),
    npu.npu_rms_norm_backward: (
        {"dy": of(6, 8), "input": of(6, 8), "gamma": of(8), "rstd": of(6, 1, dtype=torch.float32)},
        [
            ({"rstd": of(6, 1)}, "rstd is"),
            ({"rstd": of(6, dtype=torch.float32)}, "rstd's shape"),
            ({"dy": of(6, 4)}, "dy is"),
            ({"dy": of(6, 8).float()}, "dy is"),
        ],
    ),
    npu.npu_rotary_mul: (
        {"input": of(1, 6, 2, 8), "r1": of(1, 6, 1, 8), "r2": of(1, 6, 1, 8)},
        [
            ({"input": of(1, 6, 2, 8).double()}, "input is torch.float64"),
            ({"r1": of(1, 6, 2, 8)}, "broadcast"),
            ({"r2": of(1, 6, 1, 4)}, "broadcast"),
            ({"r1": of(1, 6, 1, 8).float()}, "r1 is torch.float32"),
            ({"r2": of(1, 6, 1, 8).float()}, "r2 is torch.float32"),
            ({"input": of(1, 6, 2, 7)}, "heads of 7"),
            ({"input": of(1, 6, 2, 896)}, "heads of 896"),
            ({"input": of(1, 6, 1000, 8)}, "1000 heads"),
            ({"input": of(1000, 6, 2, 8)}, "1000 samples"),
        ],
    ),
    npu.npu_cross_entropy_loss: (
        {"input": of(6, 8), "target": ints(6, dtype=torch.int64)},
        [
            ({"target": ints(6)}, "target is"),
            ({"target": ints(5, dtype=torch.int64)}, "shapes"),
            ({"input": of(6, 8).double()}, "input is torch.float64"),
            ({"input": of(200_001, 1), "target": ints(200_001, dtype=torch.int64)}, "200001 rows"),
            ({"label_smoothing": 0.1}, "label_smoothing"),
        ],
    ),
    npu.npu_cross_entropy_loss_backward: (
        {"grad_loss": of(6), "log_prob": of(6, 8), "target": ints(6, dtype=torch.int64)},
        [
            ({"grad_loss": of(6).float()}, "grad_loss is torch.float32"),
            ({"log_prob": of(6, 8).double()}, "log_prob is torch.float64"),
            ({"target": ints(6)}, "target is torch.int32"),
        ],
    ),
    aten._fused_adamw_: (
        {name: [of(2)] for name in ("self", "grads", "exp_avgs", "exp_avg_sqs", "state_steps")}
        | {"max_exp_avg_sqs": []},
        [({"grads": []}, "different lengths"), ({"state_steps": [of(1).to("meta")]}, "on the host")],
    ),
    aten.cumsum: (
        {"self": of(4), "dim": 0},
        [({"self": ints(4, dtype=torch.int64)}, "of torch.int64 runs on the AI CPU")],
    ),
    aten.histc: (
        {"self": of(4, dtype=torch.float32), "bins": 8, "min": -0.5, "max": 7.5},
        [({"self": of(4)}, "input is torch.bfloat16"), ({"min": 0, "max": 0}, "without bounds waits")],
    ),
    aten.sort: ({"self": of(4)}, [({"self": ints(4)}, "of torch.int32 runs on the AI CPU")]),
    aten.scatter_add_: (
        {"self": of(4, 4), "dim": 1, "index": ints(4, 2, dtype=torch.int64), "src": of(4, 2)},
        [({"index": ints(4, dtype=torch.int64)}, "writes 4 values one by one")],
    ),
    torch.ops.c10d.allreduce_: (
        {"tensors": [of(4, 4)]},
        [
            ({"tensors": [of(4, 4).T]}, "a strided tensor"),
            ({"tensors": [of(4).double()]}, "tensor is torch.float64"),
            ({"tensors": [of(4) > 0]}, "tensor is torch.bool"),
        ],
    ),
    torch.ops.c10d.allgather_: (
        {"output_tensors": [[of(4) > 0]], "input_tensors": [of(4) > 0]},
        [({"input_tensors": [of(4).to(torch.complex64)]}, "tensor is torch.complex64")],
    ),
}


@pytest.mark.parametrize("packet", CALLS, ids=str)
def test_one_thing_wrong_is_refused(packet):
    func = getattr(packet, packet.overloads()[0])
    right, wrong = CALLS[packet]
    names = [a.name for a in func._schema.arguments]
    right = {("self" if name == "input" and "input" not in names else name): value for name, value in right.items()}
    assert problems(func, (), right) == []
    for change, said in wrong:
        change = {
            ("self" if name == "input" and "input" not in names else name): value for name, value in change.items()
        }
        found = problems(func, (), right | change)
        assert any(said in problem for problem in found), (said, found)


def test_every_rule_has_a_call():
    tested = {str(packet).replace(".", "::") for packet in CALLS}
    alike = {"npu::npu_fusion_attention_v2", *(name for name in RULES if name.startswith("aten::scatter"))}
    assert RULES.keys() - alike <= tested


# ── Values, which the bodies check, and the placement of fake tensors, which the watch checks ─────


def test_values_outside_the_limits_are_refused():
    logits, target = torch.zeros(3, 4), torch.tensor([0, 3, 4])
    library = install()
    try:
        npu.npu_cross_entropy_loss(logits, target.clamp(max=3), None, "none")
        for wrong in (target, target - 5):  # -100 is no label that is ignored
            with pytest.raises(AssertionError):
                npu.npu_cross_entropy_loss(logits, wrong, None, "none")
        rows, weight = torch.zeros(6, 4), torch.zeros(2, 4, 8)
        for ends, is_right in (([2, 6], True), ([2, 5], False), ([6, 2], False)):
            call = {"group_list": torch.tensor(ends), "split_item": 2, "group_type": 0}
            if is_right:
                npu.npu_grouped_matmul([rows], [weight], **call)
                continue
            with pytest.raises(AssertionError):
                npu.npu_grouped_matmul([rows], [weight], **call)
        with pytest.raises(AssertionError):  # a row that is taken twice
            npu.npu_moe_token_unpermute(rows, ints(6) + 1, torch.ones(3, 2))
    finally:
        library._destroy()


def test_operands_on_the_host_are_wrong():
    """Fake tensors refuse some of them by themselves."""
    with FakeTensorMode(), Watch() as watch, torch.device("npu:0"):
        rows, weight, weights = torch.empty(6, 4), torch.empty(2, 4, 8), torch.empty(3, 2)
        ends, place = torch.empty(2, dtype=torch.int64), torch.empty(6, dtype=torch.int32)
        kernels.npu.grouped_matmul(rows, weight, ends)
        kernels.npu.unpermute(rows, place, weights)
        assert len(watch.calls) == 2 and not watch.record.wrong
        for call in (
            lambda: kernels.npu.grouped_matmul(rows, weight, torch.empty_like(ends, device="cpu")),
            lambda: kernels.npu.unpermute(rows, torch.empty_like(place, device="cpu"), weights),
        ):
            with pytest.raises(RuntimeError, match=r"npu:0.*cpu|cpu.*npu:0"):
                call()


def test_decoding():
    """A token of three sequences: no sync, and a mask that every release of op-plugin takes.

    This one would have broadcast another.
    """
    with FakeTensorMode(), Watch() as watch, torch.device("npu:0"), torch.no_grad():
        lengths, cache = torch.empty(3, dtype=torch.int64), torch.empty(3, 20, 2, 32, dtype=HALF)
        assert attention_step(torch.empty(3, 8, 32, dtype=HALF), cache, cache, lengths, 0.3).shape == (3, 8, 32)
        x, tail = torch.empty(3, 12, dtype=HALF), torch.empty(3, 12, 3, dtype=HALF)
        causal_conv1d_step(x, torch.empty(12, 4, dtype=HALF), tail)
        q, k, v = (torch.empty(3, heads, 16, dtype=HALF) for heads in (2, 2, 4))
        gated_delta_rule_step(q, k, v, torch.empty(3, 4), torch.empty(3, 4), torch.empty(3, 4, 16, 16))
    [(func, args, _)] = watch.calls
    assert func.name().removesuffix("_v3") == "npu::npu_fusion_attention" and args[7].shape == (3, 1, 4, 20)
    assert not watch.record.wrong
