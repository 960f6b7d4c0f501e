"""Other libraries' operators beside ours, where they are installed: Liger-Kernel, FlashInfer, FlashAttention 3.

A case of another peer is the same operator once more, since the two take turns.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

MODULES = {"Liger-Kernel": "liger_kernel", "FlashInfer": "flashinfer", "FlashAttention 3": "flash_attn_interface"}

Calls = Iterator[tuple[str, Callable[[int], object]]]
"""(name of the peer, its call with the number of a copy of the inputs)."""


def missing_peers() -> list[str]:
    """The libraries that are not installed."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]


def told_of_missing() -> str:
    """What follows a list of what is measured."""
    missing = missing_peers()
    return f"; not installed, so not beside these: {', '.join(missing)}" if missing else ""


def installed(name: str, path: str, device: torch.device) -> Any:
    """A module of a library, or None where it is not installed, or not for this device."""
    if device.type != "cuda" or name in missing_peers():
        return None
    return importlib.import_module(path)


def norms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Calls:
    """Beside `rms_norm`; x [copies, T, H]."""
    liger = installed("Liger-Kernel", "liger_kernel.ops.rms_norm", x.device)
    if liger is not None:
        yield "Liger-Kernel", lambda i: liger.LigerRMSNormFunction.apply(x[i], weight, eps)
    flashinfer = installed("FlashInfer", "flashinfer.norm", x.device)
    if flashinfer is not None:
        yield "FlashInfer", lambda i: flashinfer.rmsnorm(x[i], weight, eps)


def added_norms(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Calls:
    """Beside `add_rms_norm`: FlashInfer's writes over both inputs, here over copies of them."""
    flashinfer = installed("FlashInfer", "flashinfer.norm", x.device)
    if flashinfer is not None:
        over, sums = x.clone(), residual.clone()
        yield "FlashInfer", lambda i: flashinfer.fused_add_rmsnorm(over[i], sums[i], weight, eps)


def gates(gate_up: torch.Tensor) -> Calls:
    """Beside `silu_mul`; gate_up [copies, T, 2 F]."""
    liger = installed("Liger-Kernel", "liger_kernel.ops.swiglu", gate_up.device)
    if liger is not None:
        gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
        yield "Liger-Kernel", lambda i: liger.LigerSiLUMulFunction.apply(gate[i], up[i])
    flashinfer = installed("FlashInfer", "flashinfer.activation", gate_up.device)
    if flashinfer is not None:
        yield "FlashInfer", lambda i: flashinfer.silu_and_mul(gate_up[i])


def decodes(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: list[int],
    scale: float,
) -> Calls:
    """Beside `paged_attention` of one new token a sequence; query [S, heads, D], keys and values [copies, pages, page
    size, KV heads, D], tables [S, pages of a sequence].
    """
    flash = installed("FlashAttention 3", "flash_attn_interface", query.device)
    if flash is not None:
        page_table = tables.to(query.device, torch.int32)
        seen = torch.tensor(lengths, dtype=torch.int32, device=query.device)
        yield (
            "FlashAttention 3",
            lambda i: flash.flash_attn_with_kvcache(
                query.unsqueeze(1),
                keys[i],
                values[i],
                cache_seqlens=seen,
                page_table=page_table,
                softmax_scale=scale,
                causal=True,
            ),
        )
