"""Where every tensor of a checkpoint lies, and the reading of slices of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from phalanx.parallel.split import Interval


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor. All offsets and sizes are in bytes.

    file: path of the file. offset: first byte of the data in it. num_bytes: length of the data.
    shape: dimensions, outermost first (row-major). encoding: `F32`, `F16`, `BF16`, or a GGUF block type such as `Q4_1`.
    """

    file: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    encoding: str


class Checkpoint(Protocol):
    """An opened checkpoint. Names are the canonical ones of `models/families.py`."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    @property
    def bytes_read(self) -> int: ...

    def read(self, name: str, rows: Interval | None = None, columns: Interval | None = None) -> torch.Tensor: ...
