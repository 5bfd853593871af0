"""What the installed torch can do, asked in this one file: the code runs on torch 2.7.1 to 2.13."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

HAS_GROUPED_MM = hasattr(F, "grouped_mm")  # torch >= 2.10; before that it has no CPU form
# the CPU's fused attention, called by name, takes fewer heads of K than of Q: 2.13 does, 2.7 overruns its memory
HAS_GROUPED_FLASH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

# torch 2.13 has a new name for it, and warns of the old one
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def fsdp_has_sums() -> bool:
    """FSDP2 can be told to sum gradients (torch >= 2.8); 2.7 knows only the average over the ranks."""
    from torch.distributed.fsdp import FSDPModule  # not at the top: `import kernels` is to be quick

    return hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
