"""Products of many rows: as many programs as multiprocessors go through the tiles, so that the end of one tile runs
beside the loads of the next. On Hopper tiles come and go by its tensor memory accelerator (TMA).

Warps are not specialised: for sm_90 Triton 3.7 ignores `warp_specialize` with 8 warps, which large tiles need, and with
4 compiles tiles of 64 rows alone, since it cannot halve descriptors that the host has made.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from phalanx.kernels.gpu.linear_parts import finished
from phalanx.kernels.gpu.target import target_of
from phalanx.kernels.linear_table import Choice

_GROUP_M = 8  # tiles of rows that share what is in the L2 cache of the weights
_TMA_BYTES = 16  # what addresses and strides of its tensors are multiples of


@triton.jit
def loaded(
    source, row, start, stride, num_rows, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """Rows from `row` on and a block of K from `start` on; zeros outside."""
    if TMA:
        tile = source.load([row, start])
    else:
        rows, at = row + tl.arange(0, ROWS), start + tl.arange(0, BLOCK_K)
        inside = (rows < num_rows)[:, None] & (at < K)[None, :]
        tile = tl.load(source + rows.to(tl.int64)[:, None] * stride + at[None, :], mask=inside, other=0.0)
    return tile


@triton.jit(do_not_specialize=["num_rows"])
def persistent_kernel(
    out,
    x,
    weight,
    bias,
    residual,
    x_stride,
    weight_stride,
    residual_stride,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    GATE: tl.constexpr,
    TMA: tl.constexpr,
):
    """TMA: whether out, x and weight are tensor descriptors."""
    GATED: tl.constexpr = GATE != ""
    OUTPUTS: tl.constexpr = N // 2 if GATED else N
    tiles_n: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        group = tile // (GROUP_M * tiles_n)
        group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * tiles_n)
        m = (group * GROUP_M + within % group_rows) * BLOCK_M
        n = within // group_rows * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GATED else total
        for start in range(0, K, BLOCK_K):
            part = loaded(x, m, start, x_stride, num_rows, K, BLOCK_M, BLOCK_K, TMA)
            w = loaded(weight, n, start, weight_stride, N, K, BLOCK_N, BLOCK_K, TMA)
            total = tl.dot(part, w.T, total)
            if GATED:
                w_up = loaded(weight, OUTPUTS + n, start, weight_stride, N, K, BLOCK_N, BLOCK_K, TMA)
                up = tl.dot(part, w_up.T, up)
        rows, columns = (m + tl.arange(0, BLOCK_M))[:, None].to(tl.int64), (n + tl.arange(0, BLOCK_N))[None, :]
        inside = (rows < num_rows) & (columns < OUTPUTS)
        total = finished(total, up, bias, residual, rows, columns, inside, residual_stride, OUTPUTS, GATE)
        if TMA:
            out.store([m, n], total.to(out.dtype))
        else:
            tl.store(out + rows * OUTPUTS + columns, total.to(out.dtype.element_ty), mask=inside)


def persistent(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    choice: Choice,
) -> None:
    """Fills out [m, outputs]. x and weight are `describable`; their columns, and residual's, lie side by side."""
    block_m, block_n, block_k = choice.block_m, choice.block_n, choice.block_k
    target = target_of(x)
    tma = target.arch >= 90 and describable(out)
    tiles = triton.cdiv(len(x), block_m) * triton.cdiv(out.shape[1], block_n)
    tensors: tuple[Any, ...] = (out, x, weight)
    if tma:
        blocks = [block_m, block_n], [block_m, block_k], [block_n, block_k]
        tensors = tuple(TensorDescriptor.from_tensor(each, block) for each, block in zip(tensors, blocks, strict=True))
    persistent_kernel[(min(tiles, choice.per_sm * target.num_sms),)](
        *tensors,
        bias,
        residual,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        len(x),
        N=weight.shape[0],
        K=weight.shape[1],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=_GROUP_M,
        GATE=gate,
        TMA=tma,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )


def describable(x: torch.Tensor) -> bool:
    """Whether rows begin where TMA can take them; elsewhere loads are narrow on other GPUs, too."""
    return x.data_ptr() % _TMA_BYTES == 0 and x.stride(0) * x.itemsize % _TMA_BYTES == 0
