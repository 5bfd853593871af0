"""Rung 2, contract: every operator that kernels/npu.py calls, bound to torch_npu's own schemas and
shape functions on fake NPU tensors, gives the shapes and dtypes of the native op, forward and
backward.
"""

import pytest
import torch
from fused import fused
from torch._subclasses.fake_tensor import FakeTensorMode
from watch import Watch

import kernels
from kernels import npu, triton
from kernels.moe_lora import ExpertAdapters

CU = torch.tensor([0, 7, 7, 19, 20], dtype=torch.int32)
IDS = torch.arange(40).view(20, 2) % 8
ANGLE = torch.randn(20, 8)
EXPERTS, ADAPTED = [(20, 16), (20, 2), (8, 48, 16), (8, 16, 24)], "moe_experts with adapters"
CASES = {
    "varlen_attention": ([(20, 4, 32), (20, 2, 32), (20, 2, 32)], (CU, True, 0.3)),
    "rms_norm": ([(20, 4, 32), (32,)], (1e-6,)),
    "rms_norm_gated": ([(20, 4, 32), (20, 4, 32), (32,)], (1e-6,)),
    "causal_conv1d": ([(20, 12), (12, 4)], (CU,)),
    "chunk_gated_delta_rule": ([(20, 2, 16), (20, 2, 16), (20, 4, 32), (20, 4), (20, 4)], (CU,)),
    "apply_rotary": ([(20, 4, 32), (20, 2, 32)], (ANGLE.cos(), ANGLE.sin())),
    "swiglu": ([(20, 48)], ()),
    "linear_cross_entropy": ([(20, 16), (50, 16)], (torch.tensor([-100, *range(19)]), torch.ones(20))),
    "token_log_probs": ([(20, 16), (50, 16)], (torch.tensor([-100, *range(19)]),)),
    "moe_experts": (EXPERTS, ()),
    ADAPTED: ([*EXPERTS, (8, 4, 16), (8, 48, 4), (8, 4, 24), (8, 16, 4)], ()),
}


def run(module, op: str, inputs: list, rest: tuple) -> tuple[list, list]:
    """Outputs and gradients as (shape, dtype)."""
    leaves = [x.requires_grad_() for x in inputs]
    if op in ("moe_experts", ADAPTED):
        x, *leaves = leaves
        options = {"adapters": ExpertAdapters(2.0, tuple(leaves[3:5]), tuple(leaves[5:]))} if op == ADAPTED else {}
        out = module.moe_experts(x, *rest, *leaves[:3], **options)
    else:
        out = getattr(module, op)(*leaves, *rest)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    torch.autograd.backward([y for y in outs if y.requires_grad], [torch.ones_like(y) for y in outs if y.requires_grad])
    return outs, [x.grad for x in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("module", "op"),
    [*((fused, op) for op in CASES if op not in kernels.FLA_OPS), *((triton, op) for op in kernels.TRITON_OPS)],
    ids=lambda x: x if isinstance(x, str) else "triton" if x is triton else "fused",
)
def test_shapes_and_dtypes_are_the_native_ones(module, op, dtype):
    shapes, rest = CASES[op]
    rest = (IDS,) if op in ("moe_experts", ADAPTED) else rest
    native = run(kernels, op, [torch.randn(s).to(dtype) for s in shapes], rest)
    fresh = CU.clone()  # operators cache fake tensors on it, which belong to one mode
    with FakeTensorMode() as mode, Watch() as watch:
        moved = tuple(
            fresh
            if x is CU
            else x
            if not isinstance(x, torch.Tensor)
            else mode.from_tensor(x).to("npu:0", non_blocking=True)
            for x in rest
        )
        fake = run(module, op, [torch.randn(s, dtype=dtype, device="npu:0") for s in shapes], moved)
    for ours, theirs in zip(fake, native, strict=True):
        assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
        assert all(x.device == torch.device("npu:0") for x in ours)
    assert (watch.calls or module is triton) and not watch.record.wrong


def test_every_op_has_a_case():
    cases = {*CASES} - {ADAPTED}
    assert cases | {"moe_experts_parallel"} == set(kernels.OPS)  # moe_experts_parallel is in ladder_experts.py


def test_primitives_agree_with_the_native_ones():
    """The same names, shapes and dtypes, except for what only backward reads."""
    from kernels import native

    place, ends = torch.arange(40, dtype=torch.int32), torch.arange(5, 45, 5)
    rows, weights = torch.randn(40, 16).bfloat16(), torch.rand(20, 2)
    cases = {
        "permute": (rows[:20], IDS, 8),
        "permute_backward": (rows, place, 2),
        "unpermute": (rows, place, weights),
        "sorted_rows": (rows[:20], IDS, place),
        "histogram": (IDS, 8),
        "weigh": (rows, rows, torch.rand(40, 1)),
        "grouped_matmul": (rows, torch.randn(8, 24, 16).bfloat16().transpose(1, 2), ends),
        "grouped_weight_grad": (rows, rows, ends),
        "swiglu": (rows,),
        "swiglu_backward": (rows[:, :8], rows),
    }
    for name, args in cases.items():
        theirs = getattr(native, name)(*args)
        with FakeTensorMode() as mode:
            moved = [mode.from_tensor(x).to("npu:0") if isinstance(x, torch.Tensor) else x for x in args]
            ours = getattr(npu, name)(*moved)
        ours, theirs = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
        assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs], name
