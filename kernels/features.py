"""What the installed torch can do. The code runs on torch 2.7.1 to 2.13; only this file asks."""

import torch
import torch.distributed as dist

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
# whether the CPU's fused attention takes fewer K heads than Q heads; 2.7's reads out of bounds
HAS_GROUPED_FLASH = VERSION >= (2, 13)
# whether frozen parameters of an FSDP2 unit may have another dtype than those that are trained
FSDP_TAKES_FROZEN_DTYPES = VERSION >= (2, 10)

# renamed in 2.13, which warns about the old name
all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def fsdp_has_sums() -> bool:
    """Whether FSDP2 can sum gradients (torch >= 2.8); 2.7 always averages them over the ranks."""
    from torch.distributed.fsdp import FSDPModule  # here, to keep `import kernels` fast

    return hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
