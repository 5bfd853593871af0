"""The innermost line of kernels/ or qwen35/ on the stack, as file:number."""

import sys
import traceback
from pathlib import Path
from types import FrameType

ROOT = f"{Path(__file__).parents[1]}/"
FOLDERS = (f"{ROOT}kernels/", f"{ROOT}qwen35/")
NOWHERE = "torch's own"  # autograd, FSDP, the optimizer


def calling_line() -> str:
    """Of the call that is under way."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(FOLDERS):
            return f"{frame.f_code.co_filename.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return NOWHERE


def raising_line(error: BaseException) -> str:
    """Of the call that raised the error."""
    lines = [
        f"{frame.f_code.co_filename.removeprefix(ROOT)}:{number}"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename.startswith(FOLDERS)
    ]
    return lines[-1] if lines else NOWHERE
