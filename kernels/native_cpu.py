"""Where the native operators of CPUs apply: to tensors in main memory, of a dtype that they are built for.

What they do not apply to, PyTorch does, and everything where they are not built.
"""

from __future__ import annotations

from typing import Any

import torch

from phalanx.native import find_native

LIBRARY: Any = find_native().library  # looked up once: these operators are called hundreds of times a step

FLOAT_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""As `kernels/csrc/dtype.hpp` counts them."""


def code_of(x: torch.Tensor) -> int | None:
    """How the native operators call the dtype of `x`, or None where they do not apply to it."""
    return FLOAT_CODES.get(x.dtype) if LIBRARY is not None and x.is_cpu else None


def applies_on(device: torch.device) -> bool:
    """Whether they apply to tensors on `device`, of the right dtype."""
    return LIBRARY is not None and device.type == "cpu"
