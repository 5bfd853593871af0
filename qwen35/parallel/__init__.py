"""Sharding from outside: takes a plain model, knows its module names, changes none of its code."""

from qwen35.parallel.context_parallel import share_bins, split
from qwen35.parallel.fsdp import gather_weights, held_out, let_go, reduce_held_out, shard
from qwen35.parallel.mesh import Meshes, make_meshes

__all__ = [
    "Meshes",
    "gather_weights",
    "held_out",
    "let_go",
    "make_meshes",
    "reduce_held_out",
    "shard",
    "share_bins",
    "split",
]
