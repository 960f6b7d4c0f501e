"""Where the Triton operators of GPUs apply: to CUDA tensors, where Triton can be imported.

What they do not apply to, PyTorch does. `import phalanx.kernels` loads no Triton: the first CUDA tensor does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from phalanx.kernels.gpu_work import WatchedOperators

DEVICE_TYPE = "cuda"
"""Of the tensors that the operators apply to. Tests that interpret them make it `cpu`."""


class Found(NamedTuple):
    """operators: the module `phalanx.kernels.gpu`, or None; told: which Triton, or why none."""

    operators: Any
    told: str


_found: Found | None = None  # a plain global, which torch.compile can look up


def find_triton() -> Found:
    """Imports Triton and the operators; looked for once in a process.

    torch.compile cannot trace an import: call this before a function is compiled with `fullgraph=True`.
    """
    global _found  # noqa: PLW0603
    if _found is None:
        _found = _look_for_triton()
    return _found


@contextmanager
def operators_watched() -> Iterator[None]:
    """What is found within tells of its calls: see `phalanx.kernels.watch`."""
    global _found  # noqa: PLW0603
    found = find_triton()
    if found.operators is not None:
        _found = found._replace(operators=WatchedOperators(found.operators))
    try:
        yield
    finally:
        _found = found


def operators_for(x: torch.Tensor) -> Any:
    """The module `phalanx.kernels.gpu` where its operators apply to `x`, else None."""
    return find_triton().operators if x.device.type == DEVICE_TYPE else None


def narrowing_operators_for(x: torch.Tensor, dtype: torch.dtype) -> Any:
    """The same where the GPU of `x` can also round to `dtype`, of 8 bits."""
    operators = operators_for(x)
    return operators if operators is not None and operators.narrows_on(x, dtype) else None


def applies_on(device: torch.device) -> bool:
    """Whether they apply to tensors on `device`."""
    return device.type == DEVICE_TYPE and find_triton().operators is not None


def _look_for_triton() -> Found:
    try:
        import triton
    except ImportError as error:
        remedy = "the CUDA build of PyTorch brings it, and so does `pip install triton`"
        return Found(None, f"PyTorch's alone, because Triton cannot be imported ({error}); {remedy}")
    return Found(importlib.import_module("phalanx.kernels.gpu"), f"Triton {triton.__version__}")
