"""The native library's arithmetic in every set of instructions that this processor has: the same bits, torch's sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phalanx.comm.shm_calls import DTYPE_CODES
from phalanx.kernels.rms_norm import rms_norm
from phalanx.native import find_native

NATIVE = find_native()
SETS = range(len(NATIVE.library.instruction_sets) if NATIVE.library is not None else 0)
NAMES = NATIVE.library.instruction_sets if NATIVE.library is not None else ()
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
COUNTS = (1, 7, 31, 32, 33, 64, 100, 577)

pytestmark = pytest.mark.skipif(NATIVE.library is None, reason=f"needs the native library: {NATIVE.told}")


def library() -> Any:
    assert NATIVE.library is not None
    return NATIVE.library


def numbers(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Ordinary ones and, where there is room, all that is special: both zeros, subnormal, largest, infinite, none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator).to(dtype)
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.smallest_normal / 4, -info.smallest_normal / 2, info.max, -info.max]
    special += [float("inf"), float("-inf"), float("nan")]
    for each in special:
        places = torch.randint(0, count, (max(1, count // 40),), generator=generator)
        if count >= 31:
            x[places] = torch.tensor(each, dtype=dtype)
    return x


def combined(parts: list[torch.Tensor], maximum: bool, chosen: int) -> torch.Tensor:
    out = torch.empty_like(parts[0])
    addresses = [part.data_ptr() for part in parts]
    library().combine(out.data_ptr(), addresses, out.numel(), DTYPE_CODES[out.dtype], maximum, chosen)
    return out


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """The same bits, any not-a-number being as good as another."""
    none = wanted.isnan()
    assert torch.equal(found.isnan(), none)
    bits = BITS[wanted.dtype]
    assert torch.equal(found[~none].view(bits), wanted[~none].view(bits))


@pytest.mark.parametrize("chosen", SETS, ids=NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_sums_are_those_of_torch_rounded_once(chosen: int, dtype: torch.dtype, num_parts: int) -> None:
    for count in COUNTS:
        parts = [numbers(count, dtype, 10 * count + part) for part in range(num_parts)]
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        assert_same(combined(parts, False, chosen), total.to(dtype))


@pytest.mark.parametrize("chosen", SETS, ids=NAMES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_maxima_are_those_of_torch(chosen: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        parts = [numbers(count, dtype, 10 * count + part) for part in range(3)]
        wanted = torch.maximum(torch.maximum(parts[0], parts[1]), parts[2])
        found = combined(parts, True, chosen)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found[~wanted.isnan()], wanted[~wanted.isnan()])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 31, 64, 96, 576, 577])
def test_a_norm_has_the_same_bits_in_all_sets_and_torchs_value(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x, residual = (torch.randn(5, width, generator=generator).to(dtype) for _ in range(2))
    x[1, 0] = torch.finfo(dtype).smallest_normal / 2
    weight = torch.randn(width, generator=generator).to(dtype)
    found = []
    for chosen in SETS:
        normed, total = torch.empty_like(x), torch.empty_like(x)
        tensors = (normed, total, x, residual, weight)
        addresses = [tensor.data_ptr() for tensor in tensors]
        library().add_rms_norm(*addresses, 1e-5, 5, width, DTYPE_CODES[dtype], chosen)
        found.append((normed, total))
    for normed, total in found:
        assert_same(total, found[0][1])
        assert_same(normed, found[0][0])
    normed, total = found[0]
    assert torch.equal(total, x + residual)
    wanted = rms_norm(total.double(), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
