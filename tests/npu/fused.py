"""The ops over npu.py's primitives, as a run on NPUs selects them."""

import kernels

fused = kernels.select("npu", {**dict.fromkeys(kernels.FLA_OPS, "native"), "rms_norm_gated": "torch_npu"})
