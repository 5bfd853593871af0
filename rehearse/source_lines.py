"""Where in the project something was called: its innermost line in kernels/ or qwen35/, by file and number."""

import sys
from pathlib import Path
from types import FrameType

ROOT = str(Path(__file__).parents[1])
FOLDERS = (f"{ROOT}/kernels/", f"{ROOT}/qwen35/")
NOWHERE = "torch's own"  # autograd, FSDP, the optimizer


def place() -> str:
    """Of the call that is under way."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(FOLDERS):
            return f"{frame.f_code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return NOWHERE


def place_of(error: BaseException) -> str:
    """Of the call that raised it."""
    found, step = NOWHERE, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename.startswith(FOLDERS):
            found = f"{step.tb_frame.f_code.co_filename[len(ROOT) + 1 :]}:{step.tb_lineno}"
        step = step.tb_next
    return found
