"""How checkpoints store numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Encoding(NamedTuple):
    """Storage in blocks of `block_values` that take `block_bytes`."""

    block_values: int
    block_bytes: int

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape`, whose innermost dimension is a whole number of blocks."""
        count = 1
        for size in shape:
            count *= size
        return count // self.block_values * self.block_bytes


# Block sizes: ggml's `block_q4_0` and its kin (ggml-common.h); a K block is 256 values. Names are those of ggml and
# safetensors.
ENCODINGS: Mapping[str, Encoding] = {
    "F32": Encoding(1, 4),
    "F16": Encoding(1, 2),
    "BF16": Encoding(1, 2),
    "Q4_0": Encoding(32, 18),
    "Q4_1": Encoding(32, 20),
    "Q5_0": Encoding(32, 22),
    "Q5_1": Encoding(32, 24),
    "Q8_0": Encoding(32, 34),
    "Q4_K": Encoding(256, 144),
    "Q5_K": Encoding(256, 176),
    "Q6_K": Encoding(256, 210),
}

ALL_ENCODINGS: Mapping[str, Encoding] = {
    **ENCODINGS,
    "I8": Encoding(1, 1),
    "I32": Encoding(1, 4),
    "I64": Encoding(1, 8),
    "F8_E4M3": Encoding(1, 1),
}
"""With those of the parts of matrices that a safetensors file holds quantised, by its names of dtypes."""

PLAIN_ENCODINGS = ("F32", "F16", "BF16")
