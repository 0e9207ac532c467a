"""bfloat16 for Triton's interpreter, which keeps it as raw 16-bit integers and computes with those, without a word.

Three things work after `install()`: loading and storing, casting to and from other types (rounding to the nearest, ties
to even, as the hardware does), and matrix products. Any other arithmetic on bfloat16 raises: kernels compute in
float32, and a slip would otherwise be a wrong number. Maxima let NaN through, which the shipped ones hide. And calls
between kernels' functions skip the work that the interpreter repeats for each of them, which is a third of its time.

For tests only, in a process with TRITON_INTERPRET=1: `import interpreter_bf16; interpreter_bf16.install()`
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    """uint16 -> the float32 whose upper half they are."""
    return np.left_shift(bits.astype(np.uint32), 16).view(np.float32)


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16: add just under half of the last place kept, and 1 where that is odd, then cut."""
    x = np.asarray(x, dtype=np.float32, order="C")
    whole = x.view(np.uint32).astype(np.uint64)
    rounded = (whole + 0x7FFF + (whole >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(to_float32(handle.data), tl.float32) if is_bf16(handle) else handle


def install() -> None:
    original = {name: getattr(InterpreterBuilder, name) for name in ("binary_op", "unary_op", "create_dot")}
    casts = {name: getattr(InterpreterBuilder, name) for name in CASTS}

    def refuse_bf16(name):
        def op(self, *args):
            if any(isinstance(a, TensorHandle) and is_bf16(a) for a in args):
                raise NotImplementedError("arithmetic on bfloat16 in the interpreter: compute in float32")
            return original[name](self, *args)

        return op

    def dot(self, a, b, *rest):
        return original["create_dot"](self, widened(a), widened(b), *rest)

    def cast(name):
        def op(self, source, target, *rest):
            if target.scalar == tl.bfloat16:
                return source if is_bf16(source) else TensorHandle(to_bits(source.data), tl.bfloat16)
            source = widened(source)
            return source if source.dtype.scalar == target.scalar else casts[name](self, source, target, *rest)

        return op

    for name in ("binary_op", "unary_op"):
        setattr(InterpreterBuilder, name, refuse_bf16(name))
    InterpreterBuilder.create_dot = dot
    for name in CASTS:
        setattr(InterpreterBuilder, name, cast(name))

    min_max = ReduceOps.min_max
    seen = {np.nanmax: np.max, np.nanmin: np.min}
    ReduceOps.min_max = lambda self, x, val_reduce_op, idx_reduce_op=None: min_max(
        self, x, seen.get(val_reduce_op, val_reduce_op), idx_reduce_op
    )
    patch_and_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        ours = not self.fn.__module__.startswith("triton.")  # the launch has patched what our functions see already
        return self.rewrite()(*args, **kwargs) if ours else patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


CASTS = [
    *["cast_impl", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui"],
    *["create_fp_ext", "create_fp_trunc", "create_fp_to_fp"],
]
