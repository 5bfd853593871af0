"""One training step of a recipe on a virtual cluster of NPUs: `python -m rehearse CONFIG`.

This process is rank 0 of as many NPUs as the run will have. Tensors on the device are fake: shapes
without memory. Model, sharding, step and operators are the run's own, with torch_npu's real
schemas and shape functions, and torch's real FSDP over a fake process group. Speed, HCCL and CANN's
own bugs are not covered.
"""
