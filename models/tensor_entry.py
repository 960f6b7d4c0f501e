"""Where one tensor of a checkpoint lies: what is told to ranks, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phalanx.models.scheme import Scheme

PackingLayout = Literal["awq", "gptq", "packed", "bytes"]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor. All offsets and sizes are in bytes.

    file: path of the file. offset: first byte of the data in it. num_bytes: length of the data.
    shape: dimensions, outermost first (row-major). encoding: `F32`, `F16`, `BF16`, or a GGUF block type such as `Q4_1`.
    interleaved_head_dim: 0, or the head dimension where the rows of each head are stored in the order of GGUF's Llama
    (row 0 of the first half, row 0 of the second half, row 1 of the first, ...); `Checkpoint.read` undoes it.
    packing: of a matrix that is stored as several tensors; the rest is that of its integers but for the shape, which is
    the matrix's.
    """

    file: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    encoding: str
    interleaved_head_dim: int = 0
    packing: Packing | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """A matrix [N, K] as a quantiser has stored it: G groups of inputs, P integers of `scheme.bits` in 32 bits.

    layout: `awq` (weight [K, N/P], P outputs in the order of AWQ; zeros [G, N/P] likewise; scales [G, N]), `gptq`
    (weight [K/P, N], zeros [G, N/P], scales [G, N]), `packed` (weight [N, K/P], zeros [N/P, G], scales [N, G]) or
    `bytes` (weight [N, K], zeros and scales [N/R, G]). Integers are in the order of their bits, and from 0 on but for
    bytes.
    parts: `weight`, `scales`, and where there are any `zeros` and `g_idx` [K], the group of each input. names: what
    the parts are called in the file. rows_together: outputs R that share a scale; 0 for all of them.
    zero_step: what is added to a zero as it is stored.
    """

    layout: PackingLayout
    scheme: Scheme
    parts: dict[str, TensorEntry]
    names: dict[str, str]
    rows_together: int = 1
    zero_step: int = 0
