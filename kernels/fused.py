"""The ops on an NPU: the same algorithms over npu.py's primitives instead of native.py's.

All shapes follow from the inputs' shapes, and nothing waits for the device: lengths come from
cu_seqlens, which is on the host.
"""

from functools import partial

from kernels import attention, cross_entropy, moe, moe_parallel, npu, rowwise

apply_rotary = partial(rowwise.apply_rotary, primitives=npu)
linear_cross_entropy = partial(cross_entropy.linear_cross_entropy, primitives=npu)
moe_experts = partial(moe.moe_experts, primitives=npu)
moe_experts_parallel = partial(moe_parallel.moe_experts_parallel, primitives=npu)
rms_norm = partial(rowwise.rms_norm, primitives=npu)
rms_norm_gated = partial(rowwise.rms_norm_gated, primitives=npu)
swiglu = partial(rowwise.swiglu, primitives=npu)
varlen_attention = partial(attention.varlen_attention, primitives=npu)
