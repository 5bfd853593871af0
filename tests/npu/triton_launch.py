"""What a run does first with its Triton kernels, on a stand-in for CANN's toolkit: `python tests/npu/triton_launch.py OUT`.

The real triton-ascend compiles each kernel (BiShengIR's compiler does all but CANN's own last step), generates and compiles its
launcher, and launches it through the real torch_npu's queue. The first tile of the gated norm is one that does not fit.
"""

import ctypes
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

home = os.environ.pop("ASCEND_HOME_PATH")  # of which torch_npu would want to know more
import torch  # noqa: E402
import torch_npu  # noqa: E402
from triton.runtime import driver  # noqa: E402

import kernels  # noqa: E402
from kernels.triton import tiles as of_device  # noqa: E402
from kernels.triton.first_run import Layer, compile_kernels  # noqa: E402
from kernels.triton.tiles import Tiles  # noqa: E402


def main() -> None:
    os.environ["ASCEND_HOME_PATH"] = home
    too_large, begun, falls = replace(Tiles.of(128, 128), elements=1 << 13), [], []
    drained = torch_npu._C._npu_getCurrentRawStream
    with (
        mock.patch.object(Tiles, "of", return_value=too_large),
        mock.patch.object(
            torch_npu._C, "_npu_getCurrentRawStream", lambda index: begun.append("drained") or drained(index)
        ),
    ):
        of_device._driver()
        chosen, layer = kernels.select("npu"), Layer(16, 32, 128, 128, torch.bfloat16)
        tiles, found = compile_kernels(chosen, layer, torch.device("cpu"), begun.append, falls.append)
    torch.npu.synchronize()
    launches = ctypes.c_int.in_dll(ctypes.CDLL("libruntime.so"), "launches").value
    told = {"tiles": asdict(tiles), "kernels": [x.kernel for x in found], "begun": begun, "falls": falls}
    told |= {
        "launches": launches,
        "stream": driver.active.get_current_stream is torch_npu._C._npu_getCurrentRawStreamNoWait,
    }
    Path(sys.argv[1]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
