"""The KV cache in 8 bits: int8, or the floats of e4m3 (Micikevicius et al. 2022, arXiv 2209.05433).

Each head of each token has a scale of its own for its key and one for its value, found when they are written: no
calibration, nothing cut off, and an outlier in one token costs no other. What a checkpoint may say of scales is for
formats that have one for all tokens, and is not needed. Scales are bfloat16, rounded up, so that the largest magnitude
is the format's largest or hardly less: D + 2 bytes in place of 2 D.

Shapes: T tokens, K KV heads, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from phalanx.kernels import triton_gpu
from phalanx.kernels.quantised_rows import LEAST, limit_of
from phalanx.native import find_native

KVScales = tuple[torch.Tensor, torch.Tensor]
"""Of a cache of keys and of one of values, [pages, K, page_size] bfloat16 each: a head's lie side by side in a page."""

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""As `engine.kv_cache_dtype` calls them."""

LEAST_FLOAT8 = 2.0**-6
"""Below, an e4m3 would be subnormal, which costs readers more than the bits are worth."""

_PAGE_CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}  # as `kernels/csrc/operators.hpp` counts them


class NativeScales(NamedTuple):
    """As native operators are told of them: addresses, elements from a page's to the next page's, and what the pages
    hold. All 0 where they hold what the model computes in.
    """

    keys: int = 0
    values: int = 0
    stride: int = 0
    pages: int = 0


def quantise_kv(x_TKD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values [T, K, D] -> (q [T, K, D] of `dtype`, scales [T, K] bfloat16), so that x is nearly q * scale.

    scale: max |x| / limit, rounded up; q: x / scale, rounded to nearest, but zero where it is below 2^-6, the least
    number of e4m3 that is not subnormal: that is 2^-14 of the largest, which itself is only known to 2^-4. dtype: int8
    or float8_e4m3fn, else ValueError. Where a head holds what is no finite number, so does what is read.
    """
    limit = limit_of(dtype)
    exact = x_TKD.float().abs().amax(-1).clamp_min(LEAST) / limit
    scales = ((exact.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    q = x_TKD.float() * scales.float().reciprocal().unsqueeze(-1)
    q = q.round() if dtype == torch.int8 else q.masked_fill(q.abs() < LEAST_FLOAT8, 0.0)
    return q.to(dtype), scales


def dequantise_kv(q_KD: torch.Tensor, scales_K: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q [..., K, D], scales [..., K] -> [..., K, D] of `dtype`."""
    return q_KD.to(dtype) * scales_K.to(dtype).unsqueeze(-1)


def scales_of_slots(scales: torch.Tensor) -> torch.Tensor:
    """Of a cache, [pages, K, page_size] -> [pages, page_size, K], a view: as its keys lie."""
    return scales.transpose(1, 2)


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """A cache that PyTorch can gather from and scatter to: of 8-bit floats their bytes, the same memory."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def head_bytes(cache: torch.Tensor) -> int:
    """Of a head of a token in a cache [.., D], its scale included."""
    return cache.shape[-1] * cache.itemsize + (torch.bfloat16.itemsize if cache.dtype in _PAGE_CODES else 0)


def check_scales(cache: torch.Tensor, kv_scales: KVScales | None) -> None:
    """Raises TypeError where the cache is in 8 bits and there are no scales, or the other way round."""
    quantised = cache.dtype in _PAGE_CODES
    if quantised != (kv_scales is not None):
        has = "has no" if quantised else "takes none, but has"
        raise TypeError(f"a KV cache of {cache.dtype} {has} scales; 8-bit caches have them, others do not")


def told_of_kv(kv_cache_dtype: str, device: torch.device) -> str:
    """For the start-up table: what reads and writes pages in 8 bits."""
    if device.type == "cpu":
        found = find_native()
        serves, told = found.library is not None, found.told
    else:
        serves, told = triton_gpu.applies_on(device), triton_gpu.find_triton().told
    way = "attended to as they are" if serves else "widened to float32 by PyTorch, which is slow"
    return f"{kv_cache_dtype}, {way}: {told}"


def native_scales(cache: torch.Tensor, kv_scales: KVScales | None) -> NativeScales | None:
    """None where native operators do not apply to scales that lie so."""
    if kv_scales is None:
        return NativeScales()
    keys, values = kv_scales
    if not (keys.is_contiguous() and values.is_contiguous()):
        return None
    return NativeScales(keys.data_ptr(), values.data_ptr(), keys.stride(0), _PAGE_CODES[cache.dtype])
