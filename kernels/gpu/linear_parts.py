"""What the kernels of `linear` share: the end of a tile, and where partial sums meet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.gated_mul import gated

MAX_TILES = 1 << 16
_counters: dict[tuple[torch.device, int | None], torch.Tensor] = {}  # by stream, or None for all CUDA graphs


@triton.jit
def finished(
    total, up, bias, residual, row, column, inside, residual_stride, OUTPUTS: tl.constexpr, GATE: tl.constexpr
):
    """A tile of sums with all that follows them, float32. GATE: "" or an activation, of what `up` is multiplied by."""
    if bias is not None:
        total += tl.load(bias + column, mask=column < OUTPUTS, other=0.0).to(tl.float32)
        if GATE != "":
            up += tl.load(bias + OUTPUTS + column, mask=column < OUTPUTS, other=0.0).to(tl.float32)
    if GATE != "":
        total = gated(total, up, GATE == "gelu")
    if residual is not None:
        total += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    return total


def counters_of(x: torch.Tensor) -> torch.Tensor:
    """`MAX_TILES` counters at zero, int32, which whoever counts by them leaves at zero.

    Launches of one stream take turns, so they share theirs; so do all CUDA graphs, of which one runs at a time. Raises
    RuntimeError in a capture before the first call outside of one.
    """
    device = x.device
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        if (device, None) not in _counters:
            raise RuntimeError(
                "a product is captured in a CUDA graph before its kernels were ever launched; run the step once before "
                "it is captured, which also compiles them"
            )
        return _counters[device, None]
    stream = torch.cuda.current_stream(device).cuda_stream if x.is_cuda else 0
    for key in (stream, None):
        if (device, key) not in _counters:
            _counters[device, key] = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    return _counters[device, stream]
