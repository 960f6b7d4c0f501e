"""Where one tensor of a checkpoint lies: what is told to ranks, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor. All offsets and sizes are in bytes.

    file: path of the file. offset: first byte of the data in it. num_bytes: length of the data.
    shape: dimensions, outermost first (row-major). encoding: `F32`, `F16`, `BF16`, or a GGUF block type such as `Q4_1`.
    interleaved_head_dim: 0, or the head dimension where the rows of each head are stored in the order of GGUF's Llama
    (row 0 of the first half, row 0 of the second half, row 1 of the first, ...); `Checkpoint.read` undoes it.
    """

    file: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    encoding: str
    interleaved_head_dim: int = 0
