"""Sharding from outside: takes a plain model, knows its module names, changes none of its code."""

from qwen35.parallel.fsdp import loss_scale, make_mesh, reduce_held_out, shard

__all__ = ["loss_scale", "make_mesh", "reduce_held_out", "shard"]
