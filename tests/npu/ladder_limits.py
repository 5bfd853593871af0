"""rehearse/limits.py refuses what a 910B's operators refuse: valid calls, each with one error."""

import pytest
import torch

import kernels.npu  # noqa: F401  # registers torch.ops.npu
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
        ],
    ),
    npu.npu_fusion_attention_grad: (
        {"query": Q, "key": KV, "value": KV, "dy": Q, "head_num": 4, "input_layout": "TND", "attention_in": Q}
        | {"softmax_max": STATS, "softmax_sum": STATS, "actual_seq_qlen": [8], "actual_seq_kvlen": [8]},
        [
            ({"dy": Q.float()}, "dy is not like"),
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
            ({"weight": [of(2, 4, 16)[..., ::2]]}, "nor its transposed view is contiguous"),
            ({"x": [of(6, 70000)], "weight": [of(2, 70000, 8)]}, "above 65535"),
            ({"x": [of(4, 6)], "weight": [of(6, 8)], "group_type": 2}, "transposed view of its rows"),
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
            ({"grad_permuted_tokens": of(12, 4).float()}, "gradient's dtype"),
        ],
    ),
    npu.npu_moe_token_unpermute: (
        {"permuted_tokens": of(12, 4), "sorted_indices": ints(12), "probs": of(6, 2, dtype=torch.float32)},
        [
            ({"probs": of(6, 2, dtype=torch.float64)}, "probs is"),
            ({"sorted_indices": ints(11)}, "length"),
            ({"sorted_indices": ints(12, dtype=torch.int64)}, "sorted_indices is"),
        ],
    ),
    npu.npu_swiglu: (
        {"input": of(6, 8)},
        [({"input": of(6, 7)}, "an axis of 7"), ({"input": of(8, 6).T}, "strided"), ({"input": of(0, 8)}, "empty")],
    ),
    npu.npu_swiglu_backward: (
        {"grad_output": of(6, 4), "input": of(6, 8)},
        [({"grad_output": of(6, 4).float()}, "the gradient's dtype"), ({"grad_output": of(4, 6).T}, "strides")],
    ),
    npu.npu_rms_norm: (
        {"input": of(6, 8), "gamma": of(8, dtype=torch.float32)},
        [({"gamma": of(4)}, "gamma's shape"), ({"gamma": of(8, dtype=torch.float16)}, "gamma is torch.float16")],
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
        ],
    ),
    npu.npu_rotary_mul: (
        {"input": of(1, 6, 2, 8), "r1": of(1, 6, 1, 8), "r2": of(1, 6, 1, 8)},
        [({"r1": of(1, 6, 2, 8)}, "broadcast"), ({"r2": of(1, 6, 1, 8, dtype=torch.float64)}, "r2 is")],
    ),
    npu.npu_cross_entropy_loss: (
        {"input": of(6, 8), "target": ints(6, dtype=torch.int64)},
        [
            ({"target": ints(6)}, "target is"),
            ({"input": of(200_001, 1), "target": ints(200_001, dtype=torch.int64)}, "200001 rows"),
            ({"label_smoothing": 0.1}, "label_smoothing"),
        ],
    ),
    npu.npu_cross_entropy_loss_backward: (
        {"grad_loss": of(6), "log_prob": of(6, 8), "target": ints(6, dtype=torch.int64)},
        [({"grad_loss": of(6).float()}, "grad_loss torch.float32")],
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
    aten.sort: ({"self": of(4)}, [({"self": ints(4)}, "of torch.int32 runs on the AI CPU")]),
    aten.scatter_add_: (
        {"self": of(4, 4), "dim": 1, "index": ints(4, 2, dtype=torch.int64), "src": of(4, 2)},
        [({"index": ints(4, dtype=torch.int64)}, "writes 4 values one by one")],
    ),
    torch.ops.c10d.allreduce_: (
        {"tensors": [of(4, 4)]},
        [({"tensors": [of(4, 4).T]}, "a strided tensor"), ({"tensors": [of(4).to(torch.complex64)]}, "tensor is")],
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
    assert {name for name in RULES if not name.startswith("aten::scatter")} <= tested
