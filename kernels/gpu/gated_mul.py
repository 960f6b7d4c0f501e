"""`silu_mul`, `gelu_mul`: y = activation(gate) * up, the gates of SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.narrow import narrowed
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.row_norm import ONE_PASS, as_rows
from phalanx.kernels.quantised_rows import LEAST, limit_of

_BLOCK = 1024  # columns of a program that quantises nothing
_LOOP_BLOCK = 4096  # columns that are taken at a time of a row beyond ONE_PASS


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """Of float32 tiles. The tanh in GELU's approximation is a sigmoid: (1 + tanh(z)) / 2 = sigmoid(2 z)."""
    if GELU:
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up  # 2 sqrt(2 / pi)
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _gated_at(gate_up, row, column, inside, stride, WIDTH: tl.constexpr, GELU: tl.constexpr):
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    return gated(gate, up, GELU)


@triton.jit
def _gated_mul_kernel(out, gate_up, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """A program a block of columns of a row; neighbours in the row are neighbours in time."""
    num_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = _gated_at(gate_up, row, column, inside, stride, WIDTH, GELU)
    tl.store(out + row * WIDTH + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_mul_quantised_kernel(
    out,
    scales,
    gate_up,
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
):
    """A program a row: in registers where the block holds it, else calculated once for its scale and once more."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    whole: tl.constexpr = out.dtype.element_ty == tl.int8
    values = _gated_at(gate_up, row, column, column < WIDTH, stride, WIDTH, GELU)
    largest = tl.abs(values)
    for start in range(BLOCK, WIDTH, BLOCK):
        at = start + column
        largest = tl.maximum(largest, tl.abs(_gated_at(gate_up, row, at, at < WIDTH, stride, WIDTH, GELU)))
    amax = tl.maximum(tl.max(largest, 0), LEAST)
    inverse = LIMIT / amax
    tl.store(scales + row, amax / LIMIT)
    q = narrowed(values, inverse, LIMIT, whole, out.dtype.element_ty)
    tl.store(out + row * WIDTH + column, q, mask=column < WIDTH)
    for start in range(BLOCK, WIDTH, BLOCK):
        at = start + column
        values = _gated_at(gate_up, row, at, at < WIDTH, stride, WIDTH, GELU)
        q = narrowed(values, inverse, LIMIT, whole, out.dtype.element_ty)
        tl.store(out + row * WIDTH + at, q, mask=at < WIDTH)


def _fake(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@operator(fake=_fake)
def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As `phalanx.kernels.silu_mul`, which calls it; so for the others."""
    return _launch(gate_up, gelu=False)


@operator(fake=_fake)
def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    return _launch(gate_up, gelu=True)


def _fake_quantised(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    return gate_up.new_empty((num_rows, width), dtype=dtype), gate_up.new_empty((num_rows,), dtype=torch.float32)


@operator(fake=_fake_quantised)
def silu_mul_quantised(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_quantised(gate_up, dtype, gelu=False)


@operator(fake=_fake_quantised)
def gelu_mul_quantised(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch_quantised(gate_up, dtype, gelu=True)


def _launch(gate_up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    gate_up = as_rows(gate_up)
    out = _fake(gate_up)
    num_rows, width = out.shape
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        grid = (num_rows * triton.cdiv(width, block),)
        _gated_mul_kernel[grid](out, gate_up, gate_up.stride(0), WIDTH=width, BLOCK=block, GELU=gelu, num_warps=4)
    return out


def _launch_quantised(gate_up: torch.Tensor, dtype: torch.dtype, *, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    limit = limit_of(dtype)
    gate_up = as_rows(gate_up)
    out, scales = _fake_quantised(gate_up, dtype)
    num_rows, width = out.shape
    if out.numel():
        block = triton.next_power_of_2(width) if width <= ONE_PASS else _LOOP_BLOCK
        _gated_mul_quantised_kernel[(num_rows,)](
            out,
            scales,
            gate_up,
            gate_up.stride(0),
            WIDTH=width,
            BLOCK=block,
            GELU=gelu,
            LIMIT=limit,
            LEAST=LEAST,
            num_warps=max(2, min(32, block // 512)),
        )
    return out, scales


EXAMPLES = (
    Example("silu bf16 11008", lambda: silu_mul(meta(32, 2 * 11008))),
    Example("gelu bf16 11008", lambda: gelu_mul(meta(32, 2 * 11008))),
    Example("silu int8 14336", lambda: silu_mul_quantised(meta(32, 2 * 14336), torch.int8)),
    Example("silu fp8 14336", lambda: silu_mul_quantised(meta(32, 2 * 14336), torch.float8_e4m3fn), archs=(90,)),
    Example("gelu fp8 28672", lambda: gelu_mul_quantised(meta(8, 2 * 28672), torch.float8_e4m3fn), archs=(90,)),
)
