"""The gated delta net's operators as Triton kernels, for triton-ascend 3.2.0 and upstream triton.

Imported only when selected: no other part of kernels/ needs triton.
"""

from kernels.triton.causal_conv1d import causal_conv1d
from kernels.triton.delta_rule import chunk_gated_delta_rule
from kernels.triton.norm import rms_norm_gated

__all__ = ["causal_conv1d", "chunk_gated_delta_rule", "rms_norm_gated"]
