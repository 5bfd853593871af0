"""A run's first use of its Triton kernels, with a stand-in toolkit: `triton_launch.py OUT`.

The real triton-ascend compiles each kernel (with BiShengIR, except for CANN's last step), compiles
its launcher and launches it through the real torch_npu's queue. The gated norm's first tile does
not fit.
"""

import ctypes
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

home = os.environ.pop("ASCEND_HOME_PATH")  # else torch_npu would look for more of CANN
import torch  # noqa: E402
import torch_npu  # noqa: E402
from triton.runtime import driver  # noqa: E402

import kernels  # noqa: E402
from kernels.triton import tiles as of_device  # noqa: E402
from kernels.triton.tiles import Tiles  # noqa: E402
from qwen35.config.load import load_settings  # noqa: E402
from qwen35.tools.compilation import compile_here  # noqa: E402


def main() -> None:
    os.environ["ASCEND_HOME_PATH"] = home
    too_large, begun, told = replace(Tiles.of(128, 128), elements=1 << 13), [], []
    heads = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    text = SimpleNamespace(**heads, linear_key_head_dim=128, linear_value_head_dim=128)
    settings = load_settings("configs/tiny.yaml")
    heartbeat = SimpleNamespace(at=lambda what, patience: begun.append(what.partition("(")[2].rstrip(")")))
    drained = torch_npu._C._npu_getCurrentRawStream
    with (
        mock.patch.object(Tiles, "of", return_value=too_large),
        mock.patch.object(
            torch_npu._C, "_npu_getCurrentRawStream", lambda index: begun.append("drained") or drained(index)
        ),
    ):
        of_device._driver()
        tiles, seconds = compile_here(
            settings, text, kernels.select("npu"), torch.device("cpu"), heartbeat, told.append
        )
    torch.npu.synchronize()
    launches = ctypes.c_int.in_dll(ctypes.CDLL("libruntime.so"), "launches").value
    stream = driver.active.get_current_stream is torch_npu._C._npu_getCurrentRawStreamNoWait
    found = {"tiles": asdict(tiles), "kernels": list(seconds), "begun": begun, "told": told}
    Path(sys.argv[1]).write_text(json.dumps(found | {"launches": launches, "stream": stream}))


if __name__ == "__main__":
    main()
