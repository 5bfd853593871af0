"""triton-ascend 3.2.0's interpreter with fixes, which also counts the bytes read and written.

TRITON_INTERPRET=1 must be set before triton is imported. The fixes: it
multiplies bf16 bits as integers, truncates to bf16 instead of rounding, and converts arrays to
numbers in a way that newer numpy refuses. It also replaces the whole language anew at each call of
a function, which took a third of its time; once for each function is enough, since that stays.

Products of fp32 are of TF32 numbers where a kernel does not ask for all bits, as on a GPU.
"""

from functools import cache

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

moved = {"read": 0, "written": 0}  # bytes, without masked elements
TYPES = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}


def install() -> None:
    builder, make_load, make_store = (
        interpreter.InterpreterBuilder,
        interpreter._interpreter.load,
        interpreter._interpreter.store,
    )
    patch_tensor = interpreter._patch_lang_tensor

    def load(pointers, mask, other, dtype):
        moved["read"] += int(np.count_nonzero(mask)) * np.dtype(dtype).itemsize
        return make_load(pointers, mask, other, dtype)

    def store(pointers, value, mask):
        moved["written"] += int(np.count_nonzero(mask)) * value.dtype.itemsize
        return make_store(pointers, value, mask)

    class Counting:
        """The interpreter's C++ part with counting load and store."""

        def __getattr__(self, name):
            return {"load": load, "store": store}.get(name) or getattr(original, name)

    def patch_lang_tensor(tensor):
        patch_tensor(tensor)
        tensor.__index__ = lambda self: self.handle.data.item()
        tensor.__bool__ = lambda self: self.handle.data.size != 1 or bool(self.handle.data.item())

    original, of_pointers = interpreter._interpreter, np.dtype(np.uint64)
    interpreter._interpreter = Counting()
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_lang = cache(interpreter._patch_lang)
    of_scalar = cache(interpreter._get_np_dtype)  # which makes a table of all at each call
    interpreter._get_np_dtype = lambda x: of_pointers if x.scalar.is_ptr() else of_scalar(x.scalar)
    builder.cast_impl, builder.create_dot = _cast, _dot


def _as_torch(handle) -> torch.Tensor:
    data = np.ascontiguousarray(handle.data)
    if handle.dtype.scalar == tl.bfloat16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _cast(self, source, target):
    before, after = source.dtype.scalar, target.scalar
    if tl.bfloat16 not in (before, after) or before == after:
        return interpreter.TensorHandle(source.data.astype(interpreter._get_np_dtype(target)), after)
    if after == tl.bfloat16:
        data = _as_torch(source).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    else:
        data = _as_torch(source).to(TYPES[after]).numpy()
    return interpreter.TensorHandle(data, after)


def _dot(self, a, b, d, precision, *_):
    x, y = (_operand(h, precision) for h in (a, b))
    return interpreter.TensorHandle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _operand(handle, precision) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return _as_torch(handle).float().numpy()
    if handle.dtype.scalar == tl.float32 and precision != ir.INPUT_PRECISION.IEEE:
        return (handle.data.view(np.uint32) & 0xFFFF_E000).view(np.float32)
    return handle.data
