"""What the attention kernels share: scores, the running softmax, pages in 8 bits, and heads that go in groups.

Shapes in comments: M rows of queries, N positions, D head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels import device_plan, quantised_rows

FIELDS = tl.constexpr(device_plan.FIELDS)
LOG2_E = 1.4426950408889634
FLOAT8 = torch.float8_e4m3fn
_LEAST_AMAX = tl.constexpr(quantised_rows.LEAST)
LIFT = tl.constexpr(64.0)
"""Of weights times their values' scales, which in float16 would else be subnormal; with this they do not overflow."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def bent(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores of products of queries and keys, as exponents of 2; scale and softcap are those of `exponents`.

    tanh(x) is 1 - 2 / (exp(2 x) + 1), which is right where exp overflows.
    """
    scores = products * scale
    if SOFTCAP:
        scores = softcap * (1 - 2 / (tl.exp2(scores) + 1))
    return scores


@triton.jit
def widened(x, dtype: tl.constexpr, FLOAT8_BITS: tl.constexpr):
    """What a cache holds, as `dtype`. FLOAT8_BITS: x is e4m3 as bytes, for GPUs that cannot convert it: with the bits
    where a float16 has them, subnormal ones too, only the bias of the exponent is wrong, by a factor of 2^8.
    """
    if FLOAT8_BITS:
        bits = x.to(tl.uint16)
        moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = moved.to(tl.float16, bitcast=True) * 256.0
    return x.to(dtype)


@triton.jit
def scale_of(amax, dtype: tl.constexpr):
    """Of heads with these largest magnitudes, float32, in a cache of `dtype`: through the format's largest number, as
    bfloat16 rounded up. As `quantise_kv`, but for the last bit of the division.
    """
    LIMIT: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    exact = tl.maximum(amax, _LEAST_AMAX) / LIMIT
    bits = (exact.to(tl.uint32, bitcast=True) + 0xFFFF) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def narrowed(x, dtype: tl.constexpr, FLOAT8_BITS: tl.constexpr):
    """x, float32, as a cache holds it, of 8 bits or more. FLOAT8_BITS: as bytes of e4m3, to nearest even, the largest
    beyond the range. Whole numbers too are nearest even: of less than 2^22, where float32 has no room behind the point.

    With a bias of 127 made into one of 7, the bits of a float32 above its 20th are those of e4m3. What is below 2^-6,
    its least normal number, is zero, as `quantise_kv` has it.
    """
    if dtype == tl.float8e4nv:
        x = tl.where(tl.abs(x) < 0.015625, 0.0, x)
    if FLOAT8_BITS:
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.uint32, bitcast=True) - (120 << 23)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        x = tl.where(size < 0.015625, 0, normal) | sign
    elif dtype == tl.int8:
        x = tl.minimum(tl.maximum((x + 12582912.0) - 12582912.0, -127.0), 127.0)
    return x.to(dtype)


@triton.jit
def rotated(x, present, cos, sin, norm, eps, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Heads at the addresses x [M, 1], rotated, [M, D] float32 rounded to their dtype. present: [M, 1], which there
    are. norm: the weight of a norm that comes first, of each head over its own dimension, or None.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    other_d = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
    inside = present & (d < HEAD_DIM)
    dtype = x.dtype.element_ty
    here = tl.load(x + d, mask=inside, other=0.0).to(tl.float32)
    there = tl.load(x + other_d, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(here * here, 1) / HEAD_DIM + eps)[:, None]
        gain = tl.load(norm + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        other_gain = tl.load(norm + other_d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        here = (here * scale * gain).to(dtype).to(tl.float32)
        there = (there * scale * other_gain).to(dtype).to(tl.float32)
    cosine = tl.load(cos + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    sine = tl.load(sin + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    turned = here * cosine + tl.where(d < HEAD_DIM // 2, -there, there) * sine
    return turned.to(dtype).to(tl.float32)


@triton.jit
def softmax_step(scores, m, total, acc):
    """One more tile of scores [M, N], as exponents of 2: its weights, and with it (m, total, acc): the maximum, the sum
    of weights and the weighted sum of values so far (Milakov and Gimelshein 2018, arXiv 1805.02867). A row that has
    seen nothing keeps a maximum of -inf, and no NaN comes of it.
    """
    m_new = tl.maximum(m, tl.max(scores, 1))
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(m - shift)
    return weights, m_new, total * kept + tl.sum(weights, 1), acc * kept[:, None]


@triton.jit
def heads_of(head_table, kv, g, GROUP: tl.constexpr):
    """Query heads at the places `g` of a KV head's group, -1 where it has no more. Without a table all have GROUP."""
    if head_table is None:
        head = tl.where(g < GROUP, kv * GROUP + g, -1)
    else:
        head = tl.load(head_table + kv * GROUP + g, mask=g < GROUP, other=-1)
    return head


def exponents(scale: float, logit_softcap: float) -> tuple[float, float]:
    """(scale, softcap) for `bent`; logit_softcap 0 for none."""
    if logit_softcap:
        return 2 * LOG2_E * scale / logit_softcap, logit_softcap * LOG2_E
    return scale * LOG2_E, 0.0


@triton.jit
def scales_at(scales, page, kv, slot, present, NUM_KV: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Of a KV head at slots of pages, float32; 0 where not present. scales: [pages, NUM_KV, PAGE_SIZE]."""
    return tl.load(scales + (page * NUM_KV + kv) * PAGE_SIZE + slot, mask=present, other=0.0).to(tl.float32)


def as_read(cache: torch.Tensor, arch: int) -> tuple[torch.Tensor, bool]:
    """(cache, FLOAT8_BITS): 8-bit floats as bytes on GPUs that do not know them."""
    bits = cache.dtype == FLOAT8 and arch < 89
    return (cache.view(torch.uint8) if bits else cache), bits


def with_heads_together(query_TND: torch.Tensor) -> torch.Tensor:
    """Whose heads lie one after another; tokens may be apart."""
    if query_TND.dtype not in DTYPES:
        raise TypeError(f"attention on a GPU takes queries in bfloat16, float16 or float32, not {query_TND.dtype}")
    apart = query_TND.stride()[1:] != (query_TND.shape[2], 1)
    return query_TND.contiguous() if apart else query_TND
