"""`linear`: y = x W^T + b, and what may follow: a residual that is added, or a gate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.gated_mul import gelu_mul, silu_mul
from phalanx.kernels.gpu.linear_persistent import describable, persistent
from phalanx.kernels.gpu.linear_stream_k import stream_k
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.target import target_of
from phalanx.kernels.linear_table import Choice, Held, Product, table_of, untuned

_KERNELS = {"stream_k": stream_k, "persistent": persistent}
_forced: list[Choice] = []


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@operator(fake=_fake)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `phalanx.kernels.linear`, which calls it; so for the others."""
    return multiply(x, weight, bias)


def _fake_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _fake(x, weight, bias)


@operator(fake=_fake_add)
def linear_add(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return multiply(x, weight, bias, residual=residual)


def _fake_gated(x: torch.Tensor, weight: torch.Tensor, activation: str, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))


@operator(fake=_fake_gated)
def gated_linear(x: torch.Tensor, weight: torch.Tensor, activation: str, bias: torch.Tensor | None) -> torch.Tensor:
    return multiply(x, weight, bias, gate=activation)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    gate: str = "",
    choice: Choice | None = None,
) -> torch.Tensor:
    """x [m, k], weight [n, k] -> [m, n], or [m, n / 2] where `gate` is "silu" or "gelu": the gates are the first half
    of the weight's rows. choice: by the table of the GPU where it is None.
    """
    if choice is None:
        choice = choice_for(x, x.dtype, weight.shape[0], gated=bool(gate))
    x, weight = columns_side_by_side(x), columns_side_by_side(weight)
    unfit = choice.kernel == "persistent" and not (describable(x) and describable(weight))
    if choice.kernel == "cublas" or unfit:
        return _by_cublas(x, weight, bias, residual, gate)
    residual = None if residual is None else columns_side_by_side(residual)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((x.shape[0], weight.shape[0] // (2 if gate else 1)))
    if out.numel():
        _KERNELS[choice.kernel](out, x, weight, bias, residual, gate, choice)
    return out


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Inside, products that say no choice are made by this one."""
    _forced.append(choice)
    try:
        yield
    finally:
        _forced.pop()


def choice_for(
    x: torch.Tensor, dtype: torch.dtype, num_outputs: int, *, gated: bool = False, held: Held = ""
) -> Choice:
    """By the table of the GPU of x [m, k], unless one is `forced`. dtype: of the product."""
    if _forced:
        return _forced[-1]
    device = x.get_device() if x.is_cuda else None
    return _chosen(device, dtype, x.shape[0], num_outputs, x.shape[1], gated, held)


@cache
def _chosen(device: int | None, dtype: torch.dtype, m: int, n: int, k: int, gated: bool, held: Held) -> Choice:
    """Looked up once a shape: there are few, and hundreds of products a step."""
    product = Product(str(dtype).removeprefix("torch."), m, n, k, gated, held)
    if m == 0 or k == 0 or device is None:
        return untuned(product)
    return table_of(torch.cuda.get_device_name(device)).choose(product)


def _by_cublas(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: str
) -> torch.Tensor:
    if residual is not None and bias is None:
        return torch.addmm(residual, x, weight.t())
    y = F.linear(x, weight, bias)
    if gate:
        y = silu_mul(y) if gate == "silu" else gelu_mul(y)
    return y if residual is None else y + residual


def columns_side_by_side(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _few_rows_added() -> torch.Tensor:
    half = torch.float16
    x, weight, residual = meta(16, 4096, dtype=half), meta(4096, 4096, dtype=half), meta(16, 4096, dtype=half)
    return linear_add(x, weight, residual, None)


def _many_rows(gate: str = "", *, added: bool = False) -> torch.Tensor:
    """With the largest tile of each architecture."""
    x = meta(4096, 4096)
    block_n = 256 if target_of(x).arch >= 90 else 128
    choice = Choice("persistent", 128, block_n // 2 if gate else block_n, 64, num_warps=8, num_stages=3)
    return multiply(
        x, meta(8192, 4096), meta(8192), residual=meta(4096, 8192) if added else None, gate=gate, choice=choice
    )


EXAMPLES = (
    Example("bf16 1x4096x4096", lambda: linear(meta(1, 4096), meta(4096, 4096), None)),
    Example("bf16 8x960x576", lambda: linear(meta(8, 576), meta(960, 576), meta(960))),
    Example("bf16 1x4096x4100", lambda: linear(meta(1, 4100), meta(4096, 4100), None)),
    Example("fp16 16x4096x4096 + residual", _few_rows_added),
    Example("bf16 4x28672x4096, silu", lambda: gated_linear(meta(4, 4096), meta(28672, 4096), "silu", None)),
    Example("bf16 4096x8192x4096", _many_rows, instructions=("wgmma", "tma")),
    Example("bf16 4096x8192x4096 + residual", lambda: _many_rows(added=True), instructions=("wgmma", "tma")),
    Example("bf16 4096x8192x4096, gelu", lambda: _many_rows("gelu"), instructions=("wgmma", "tma")),
)
