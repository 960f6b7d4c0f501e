"""Names of operations in the pictures of others: torch.profiler's, and Nsight's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function

Result = TypeVar("Result")

# What Nsight sets for the programs that it starts. torch.autograd.profiler.emit_nvtx() needs no sign: it is a profiler.
_UNDER_NSIGHT = "NVTX_INJECTION64_PATH" in os.environ and torch.version.cuda is not None


def _always() -> bool:
    return True


profiled: Callable[[], bool] = _always if _UNDER_NSIGHT else _profiler_enabled
"""Whether anybody looks. Asking takes 40 ns; a `record_function` that nobody looks at takes 6 us."""


def in_range(name: str, detail: str, function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, seen as `name` while it runs: an operation of the ledger, or its start, or an operator. detail: which
    of them it is. For where `profiled`.
    """

    def seen(*arguments: Any, **options: Any) -> Result:
        if _UNDER_NSIGHT:
            torch.cuda.nvtx.range_push(f"{name} {detail}")  # type: ignore[no-untyped-call]
        try:
            with record_function(name, detail):
                return function(*arguments, **options)
        finally:
            if _UNDER_NSIGHT:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    return seen
