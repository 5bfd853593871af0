"""Sharding from outside: takes a plain model, knows its module names, changes none of its code."""

from qwen35.parallel.fsdp import make_mesh, reduce_held_out, shard

__all__ = ["make_mesh", "reduce_held_out", "shard"]
