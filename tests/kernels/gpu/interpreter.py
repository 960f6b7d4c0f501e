"""Triton's interpreter for kernels that were jitted, on CPU tensors, with what it lacks made good.

Triton decides when a kernel is decorated whether it is interpreted; here jitted kernels, and those of Triton's own
library, are swapped for interpreted ones for a while. The interpreter keeps bfloat16 and 8-bit floats as raw bits and
calculates with these bits as if they were numbers; here they are widened, calculated with, and rounded to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.language import core, math, standard
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from phalanx.kernels import native_cpu, triton_gpu
from phalanx.kernels.gpu.ahead_of_time import kernel_modules
from phalanx.kernels.gpu.kernel_swap import swapped
from phalanx.kernels.gpu.target import H100, Target, assumed

Values = NDArray[Any]

# What the interpreter keeps as bits, and the bits' types: of NumPy, and of PyTorch, which knows the values.
_RAW = {
    tl.bfloat16: (np.uint16, torch.bfloat16),
    tl.float8e4nv: (np.uint8, torch.float8_e4m3fn),
    tl.float8e5: (np.uint8, torch.float8_e5m2),
}
_UNARY = ("cos", "exp", "exp2", "floor", "ceil", "log", "log2", "precise_sqrt", "sqrt", "sin", "rsqrt", "erf")
_IN_FLOAT32 = ("binary_op", "create_fma", *(f"create_{name}" for name in _UNARY))


@contextmanager
def interpreted(target: Target = H100) -> Iterator[None]:
    """Launchers take CPU tensors, and interpret the kernels that they would launch on `target`. The public operators
    of `phalanx.kernels` go to the launchers.
    """
    with ExitStack() as stack:
        stack.enter_context(triton.knobs.runtime.scope())
        triton.knobs.runtime.interpret = True
        stack.enter_context(_restored(tl, core, math, tl.tensor, tl.dtype, core.tensor_descriptor_base))
        interpreter._patch_lang(lambda: (tl, core))
        tl.tensor.__index__ = lambda number: int(number.handle.data.item())  # Triton 3.6 does not know NumPy 2.4
        # It would do so again at every call of a function, which takes longer than what most of them compute.
        nothing = SimpleNamespace(restore=lambda: None)
        stack.enter_context(patch.object(interpreter, "_patch_lang", lambda function: nothing))
        stack.enter_context(swapped([*kernel_modules().values(), tl, standard, core, math], interpreted_kernel))
        for name, method in _repairs().items():
            stack.enter_context(patch.object(InterpreterBuilder, name, method))
        stack.enter_context(patch.object(interpreter.ReduceScanOpInterface, "apply", _reduced_in_float32))
        stack.enter_context(patch.object(triton_gpu, "DEVICE_TYPE", "cpu"))
        stack.enter_context(patch.object(native_cpu, "LIBRARY", None))
        stack.enter_context(assumed(target))
        yield


def interpreted_kernel(kernel: Any) -> Any:
    return InterpretedFunction(kernel.fn)


@contextmanager
def _restored(*places: ModuleType | type) -> Iterator[None]:
    """The interpreter puts its own functions into Triton's language, and does not take all of them out again."""
    before = [dict(vars(place)) for place in places]
    try:
        yield
    finally:
        for place, names in zip(places, before, strict=True):
            for name, value in list(vars(place).items()):
                if name not in names:
                    delattr(place, name)
                elif value is not names[name]:
                    setattr(place, name, names[name])


def _widened(handle: TensorHandle) -> TensorHandle:
    """What is kept as bits, as float32 values; anything else as it is."""
    raw = _RAW.get(handle.dtype.scalar)
    if raw is None:
        return handle
    bits = torch.from_numpy(np.array(handle.data, order="C"))
    return TensorHandle(bits.view(raw[1]).float().numpy(), tl.float32)


def _narrowed(handle: TensorHandle, dtype: Any) -> TensorHandle:
    """Float values as bits of `dtype`. As a GPU does, 8-bit floats saturate instead of becoming infinite."""
    numpy_dtype, torch_dtype = _RAW[dtype]
    values = torch.from_numpy(np.array(handle.data, np.float32, order="C"))
    if dtype != tl.bfloat16:
        most = torch.finfo(torch_dtype).max
        values = values.clamp(-most, most)
    return TensorHandle(values.to(torch_dtype).view(getattr(torch, numpy_dtype.__name__)).numpy(), dtype)


def _in_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The method of a builder, with values for bits; what it makes is float32 where it was given bits, and rounded."""

    def repaired(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        kept = [arg.dtype.scalar for arg in args if isinstance(arg, TensorHandle) and arg.dtype.scalar in _RAW]
        made = method(self, *[_widened(arg) if isinstance(arg, TensorHandle) else arg for arg in args])
        if not kept or made.data.dtype == np.bool_:
            return made
        return _narrowed(made, kept[0])

    return repaired


def _cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def repaired(self: InterpreterBuilder, src: TensorHandle, dst_type: Any, *rest: Any) -> TensorHandle:
        src, dtype = _widened(src), dst_type.scalar
        if dtype in _RAW:
            return _narrowed(src, dtype)
        if src.dtype.is_floating() and dtype.is_floating():  # the interpreter's own conversion of bits truncates
            return TensorHandle(src.data.astype(interpreter._get_np_dtype(dtype)), dtype)
        return method(self, src, dst_type, *rest)

    return repaired


def _dot(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def repaired(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any
    ) -> TensorHandle:
        return method(self, _widened(a), _widened(b), d, *rest)

    return repaired


def _select(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A choice between bits is none of arithmetic; NumPy would take the widest of the dtypes."""

    def repaired(self: InterpreterBuilder, lhs: Any, rhs: Any, other: Any, op: Any) -> TensorHandle:
        if op is np.where:
            return method(self, lhs, rhs, other, op)
        return _in_float32(method)(self, lhs, rhs, other, op)

    return repaired


def _repairs() -> dict[str, Callable[..., TensorHandle]]:
    """By the names of the builder's methods. Those that are found on the class at the time they are called go by one
    method for all operators.
    """
    repairs = {name: _in_float32(getattr(InterpreterBuilder, name)) for name in _IN_FLOAT32}
    repairs |= {name: _cast(getattr(InterpreterBuilder, name)) for name in ("cast_impl", "create_fp_to_fp")}
    return repairs | {
        "create_dot": _dot(InterpreterBuilder.create_dot),
        "ternary_op": _select(InterpreterBuilder.ternary_op),
    }


_apply = interpreter.ReduceScanOpInterface.apply


def _reduced_in_float32(self: Any, given: Any) -> Any:
    """Sums and maxima of values instead of bits, each rounded once."""
    if not isinstance(given, tuple):
        return _reduced_in_float32(self, (given,))[0]
    wide = tuple(tl.tensor(_widened(each.handle), _typed(each, tl.float32)) if _raw(each) else each for each in given)
    return tuple(
        tl.tensor(_narrowed(made.handle, each.dtype), _typed(made, each.dtype))
        if _raw(each) and made.dtype == tl.float32
        else made
        for each, made in zip(given, _apply(self, wide), strict=True)
    )


def _raw(x: Any) -> bool:
    return isinstance(x, tl.tensor) and x.dtype.scalar in _RAW


def _typed(x: Any, dtype: Any) -> Any:
    return tl.block_type(dtype, x.type.shape) if x.type.is_block() else dtype
