"""The reading of matrices that a quantiser has stored as several tensors: see `Packing`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from phalanx.errors import ModelError
from phalanx.kernels import QuantisedRows
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.tensor_entry import Packing
from phalanx.parallel.split import Interval

# AutoAWQ packs outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest bits on: where each of them lies.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Region(NamedTuple):
    """Some outputs and inputs of a matrix."""

    rows: Interval
    columns: Interval


class PackedMatrix:
    """Rows and columns of a packed matrix, to be read some rows at a time.

    A layout whose file has the inputs as rows is read at once, packed as it is: its rows are as short as the outputs.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, region: Region) -> None:
        self._checkpoint, self._name, self._region = checkpoint, name, region
        entry = checkpoint.entry(name)
        if entry.packing is None:
            raise ValueError(f"{name} is not packed")
        self._num_outputs, self._num_inputs = entry.shape
        self._packing: Packing = entry.packing
        self._scheme = entry.packing.scheme
        self._each = 32 // self._scheme.bits
        self._held_words: torch.Tensor | None = None

    def integers(self, rows: Interval) -> torch.Tensor:
        """Of these outputs and all inputs of the region, [rows, columns] int8, as `WeightFormat` has them."""
        columns, bits = self._region.columns, self._scheme.bits
        match self._packing.layout:
            case "bytes":
                return self._plain_bytes(rows)
            case "packed":
                words = self._part("weight", rows, self._words_of(columns))
                q = self._within(_unpacked(words, bits), columns)
            case "gptq":
                first = rows.start - self._region.rows.start
                words = self._words()[:, first : first + rows.size].t()
                q = self._within(_unpacked(words, bits), columns)
            case _:
                wanted, whole = self._words_of(rows), self._words_of(self._region.rows)
                words = self._words()[:, wanted.start - whole.start : wanted.stop - whole.start]
                q = self._within(_awq_order(_unpacked(words, bits)), rows).t()
        if bits == 8:
            return (q ^ 0x80).view(torch.int8)
        return q.view(torch.int8) if self._scheme.zeros else q.view(torch.int8) - 8

    def heads(self, rows: Interval, groups: Interval) -> QuantisedRows:
        """Scales and zeros of these outputs, [rows, groups]; without integers."""
        scales, zeros = self._scales(rows, groups), self._zeros(rows, groups)
        middle = 1 << (self._scheme.bits - 1)
        if self._scheme.zeros or zeros is None:
            return QuantisedRows(torch.empty(0, dtype=torch.int8), scales, None, zeros)
        if (zeros != middle).any():
            raise ModelError(
                f"tensor {self._packing.names['zeros']} holds other zeros than {middle}, which symmetric weights of"
                f" {self._scheme.bits} bits have; set sym: false in config.json's quantization_config if they are not"
                " symmetric, or checkpoint_format to the version of GPTQ that wrote them"
            )
        return QuantisedRows(torch.empty(0, dtype=torch.int8), scales)

    def groups_of_inputs(self) -> torch.Tensor | None:
        """The group of each input of the whole matrix, [K] int64; None where they follow each other."""
        size = self._scheme.group_size
        if "g_idx" not in self._packing.parts or size is None:
            return None
        groups = self._part("g_idx", None, None).long()
        if (groups == torch.arange(len(groups)) // size).all():
            return None
        most = self._scheme.num_groups(self._num_inputs)
        if groups.min() < 0 or groups.max() >= most:
            raise ModelError(
                f"tensor {self._packing.names['g_idx']} has groups {int(groups.min())} to {int(groups.max())}, of"
                f" {most} that there are; quantise the model again"
            )
        return groups

    def _words(self) -> torch.Tensor:
        """Of a layout with the inputs as rows: all that hold the region."""
        if self._held_words is None:
            rows, columns = self._region
            some = (columns, self._words_of(rows)) if self._packing.layout == "awq" else (self._words_of(columns), rows)
            self._held_words = self._part("weight", *some)
        return self._held_words

    def _scales(self, rows: Interval, groups: Interval) -> torch.Tensor:
        if self._packing.layout in ("awq", "gptq"):
            return self._part("scales", groups, rows).t()
        return self._of_rows("scales", rows, groups)

    def _zeros(self, rows: Interval, groups: Interval) -> torch.Tensor | None:
        if "zeros" not in self._packing.parts:
            return None
        bits, step = self._scheme.bits, self._packing.zero_step
        if self._packing.parts["zeros"].encoding == "I8":
            return (self._of_rows("zeros", rows, groups).to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        words = self._words_of(rows)
        if self._packing.layout == "packed":
            return self._within(_unpacked(self._part("zeros", words, groups).t(), bits), rows).t()
        zeros = _unpacked(self._part("zeros", groups, words), bits)
        if self._packing.layout == "awq":
            zeros = _awq_order(zeros)
        # A zero of 0 is stored by GPTQ's first format as the largest one.
        return ((self._within(zeros, rows) + step) & ((1 << bits) - 1)).t()

    def _of_rows(self, part: str, rows: Interval, groups: Interval) -> torch.Tensor:
        together = self._packing.rows_together
        if together == 0:
            return self._part(part, None, None).expand(rows.size, 1)
        blocks = Interval(rows.start // together, (rows.stop - 1) // together + 1)
        found = self._part(part, blocks, groups)
        return found if together == 1 else found[torch.arange(rows.start, rows.stop) // together - blocks.start]

    def _plain_bytes(self, rows: Interval) -> torch.Tensor:
        q = self._part("weight", rows, self._region.columns).view(torch.int8)
        if self._scheme.e4m3 and ((q & 0x7F) == 0x7F).any():
            raise ModelError(f"tensor {self._packing.names['weight']} holds what is not a number; copy it again")
        return q

    def _part(self, part: str, rows: Interval | None, columns: Interval | None) -> torch.Tensor:
        return self._checkpoint.read_part(self._packing.names[part], self._packing.parts[part], rows, columns)

    def _words_of(self, some: Interval) -> Interval:
        """The words of 32 bits that hold them."""
        return Interval(some.start // self._each, -(-some.stop // self._each))

    def _within(self, unpacked: torch.Tensor, some: Interval) -> torch.Tensor:
        """Those wanted of the last dimension of whole words."""
        first = some.start % self._each
        return unpacked[..., first : first + some.size]


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., W] int32 to [..., W * 32 / bits] uint8, from the lowest bits on."""
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return octets
    return torch.stack([octets & 0xF, octets >> 4], -1).flatten(-2)


def _awq_order(unpacked: torch.Tensor) -> torch.Tensor:
    return unpacked.view(*unpacked.shape[:-1], -1, 8)[..., _AWQ_PLACES].flatten(-2)
