"""The gated delta net's operators as Triton kernels, written for triton-ascend 3.2.0 on NPUs; a stock triton takes them too.

Imported only when they are asked for: this is the one package of kernels/ that needs triton.
"""

from kernels.triton.causal_conv1d import causal_conv1d
from kernels.triton.delta_rule import chunk_gated_delta_rule
from kernels.triton.norm import rms_norm_gated

__all__ = ["causal_conv1d", "chunk_gated_delta_rule", "rms_norm_gated"]
