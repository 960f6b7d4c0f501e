"""The sum or maximum of what several ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

NARROW = (torch.bfloat16, torch.float16)


def combine(out: torch.Tensor, parts: Sequence[torch.Tensor], op: Literal["sum", "max"]) -> None:
    """Writes the sum or maximum of `parts`, taken in their order; sums of bfloat16 and float16 are rounded once.

    `out` may be one of the first two, of more than two none.
    """
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    first, second, *rest = parts
    if op == "max":
        torch.maximum(first, second, out=out)
        for part in rest:
            torch.maximum(out, part, out=out)
    elif rest and out.dtype in NARROW:
        total = first.float()
        for part in parts[1:]:
            total += part
        out.copy_(total)
    else:
        torch.add(first, second, out=out)
        for part in rest:
            out += part
