"""Memory that was not written to, found out: what `torch.empty` gives is not-a-number, or the largest whole number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, what an operator allocates is poison until it is written to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all entries together, in the Euclidean norm, beyond what rounding `expected`, float64, to the dtype leaves:
    about 1.6e-3 for bfloat16, more where it is few numbers. Infinite where any is poison.
    """
    error = (actual.double() - expected).norm()
    rounding = (expected.to(actual.dtype).double() - expected).norm()
    beyond = ((error - rounding) / expected.norm().clamp_min(1e-30)).item()
    return math.inf if math.isnan(beyond) else beyond
