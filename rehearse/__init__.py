"""One whole training step of a recipe on a virtual cluster of NPUs, on any machine: `python -m rehearse CONFIG`.

This process is rank 0 of as many NPUs as the run will have. Tensors on the device are fake, shapes without memory; the model,
the sharding, the step and the operators are the run's own: torch_npu's real schemas and shape functions, torch's real FSDP over
a group that answers at once. Not proved by it: speed, HCCL, and CANN's own bugs.
"""
