"""Where every tensor of a checkpoint lies, and the reading of slices of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from phalanx.errors import ModelError
from phalanx.models.encodings import ALL_ENCODINGS, ENCODINGS
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.split import Interval

Bytes = npt.NDArray[np.uint8]

# Decoded at a time: large enough to amortise a call, small enough that blocks and values stay in the cache.
_CHUNK_VALUES = 1 << 18


DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Of the encodings without blocks."""


class Checkpoint:
    """An opened checkpoint: reads slices of tensors, and of the files no byte more than they take.

    entries: where each tensor lies, by the canonical names of `models/families.py`. bytes_read: bytes read so far.
    May be read from several threads. Files are opened when first needed and closed by `close` or on leaving a `with`.
    """

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self.entries = dict(entries)
        self._bytes_read = 0
        self._files: dict[str, FileIO] = {}
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def read(
        self,
        name: str,
        rows: Interval | None = None,
        columns: Interval | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The slice [rows, columns] of a matrix, or [rows] of a vector; None takes a whole dimension.

        Returns a new contiguous CPU tensor of `dtype`, by default as stored: F32, F16 and BF16 as they are, quantised
        blocks as float32. Whole rows cost one read of their bytes; columns cost one read a row, of their bytes or of
        the blocks that cover them. Rows of interleaved heads start and stop on borders between heads.

        Raises ModelError, naming file and tensor, where the tensor, its file or a part of it is missing; IndexError for
        a slice outside of the tensor.
        """
        entry = self.entry(name)
        if entry.packing is not None:
            raise ValueError(f"{name} is packed: `read_values` reads what it stands for")
        return self.read_part(name, entry, rows, columns, dtype)

    def read_part(
        self,
        name: str,
        entry: TensorEntry,
        rows: Interval | None = None,
        columns: Interval | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The same of a tensor that need not be among the checkpoint's by itself. name: for errors."""
        if len(entry.shape) == 1:  # a vector is read as a matrix of one row
            if columns is not None:
                raise IndexError(f"{name} is a vector of {entry.shape[0]}; slice it by rows")
            _check_interval(name, rows, entry.shape[0], entry.interleaved_head_dim)
            values = self._read_matrix(name, entry, (1, entry.shape[0]), Interval(0, 1), rows, dtype).reshape(-1)
        elif len(entry.shape) == 2:
            _check_interval(name, rows, entry.shape[0], entry.interleaved_head_dim)
            _check_interval(name, columns, entry.shape[1], 0)
            values = self._read_matrix(name, entry, (entry.shape[0], entry.shape[1]), rows, columns, dtype)
        else:
            raise IndexError(f"{name} has {len(entry.shape)} dimensions; vectors and matrices can be read")
        return _deinterleave(values, entry.interleaved_head_dim) if entry.interleaved_head_dim else values

    def entry(self, name: str) -> TensorEntry:
        """Raises ModelError where there is none."""
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(f"tensor {name!r} is not in the checkpoint, which holds {len(self.entries)} tensors")
        return entry

    def read_blocks(self, name: str, rows: Interval, columns: Interval) -> torch.Tensor:
        """The blocks of a slice of a quantised matrix as they are stored: [rows, blocks, bytes of a block] uint8.

        columns: whole blocks. Rows are in the order in which `read` gives them. Raises as `read`.
        """
        entry = self.entry(name)
        encoding = ENCODINGS[entry.encoding]
        _check_interval(name, rows, entry.shape[0], entry.interleaved_head_dim)
        _check_interval(name, columns, entry.shape[1], 0)
        if columns.start % encoding.block_values or columns.size % encoding.block_values:
            raise IndexError(f"{name}: {columns.start}:{columns.stop} cuts a block of {encoding.block_values}")
        first, num_blocks = columns.start // encoding.block_values, columns.size // encoding.block_values
        row_bytes = encoding.num_bytes(entry.shape[1:])
        raw = np.empty((rows.size, num_blocks * encoding.block_bytes), np.uint8)
        start = entry.offset + rows.start * row_bytes + first * encoding.block_bytes
        self._read_bytes(name, entry, self._open(name, entry), raw, start, row_bytes)
        blocks = torch.from_numpy(raw).view(rows.size, num_blocks, encoding.block_bytes)
        return _deinterleave(blocks, entry.interleaved_head_dim) if entry.interleaved_head_dim else blocks

    def _read_matrix(
        self,
        name: str,
        entry: TensorEntry,
        shape: tuple[int, int],
        rows: Interval | None,
        columns: Interval | None,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        encoding, stored = ALL_ENCODINGS[entry.encoding], DTYPES.get(entry.encoding)
        rows = rows or Interval(0, shape[0])
        columns = columns or Interval(0, shape[1])
        first_block = columns.start // encoding.block_values
        num_blocks = -(-columns.stop // encoding.block_values) - first_block
        row_bytes = encoding.num_bytes(shape[1:])
        read_bytes = num_blocks * encoding.block_bytes
        start = entry.offset + rows.start * row_bytes + first_block * encoding.block_bytes
        file = self._open(name, entry)

        result = torch.empty((rows.size, columns.size), dtype=dtype or stored or torch.float32)
        if result.dtype is stored:  # straight into place
            self._read_bytes(name, entry, file, result.view(torch.uint8).numpy(), start, row_bytes)
            return result
        skipped = columns.start - first_block * encoding.block_values
        chunk_rows = max(1, _CHUNK_VALUES // (num_blocks * encoding.block_values))
        for row in range(0, rows.size, chunk_rows):
            part = result[row : row + chunk_rows]
            raw = np.empty((part.shape[0], read_bytes), np.uint8)
            self._read_bytes(name, entry, file, raw, start + row * row_bytes, row_bytes)
            part.copy_(_decode(raw, entry.encoding)[:, skipped : skipped + columns.size])
        return result

    def _read_bytes(self, name: str, entry: TensorEntry, file: FileIO, out: Bytes, start: int, row_bytes: int) -> None:
        """Fills `out` [rows, bytes] with the first bytes of rows that lie `row_bytes` apart, from offset `start`."""
        pieces = [out.reshape(-1)] if out.shape[1] == row_bytes else list(out)
        for index, piece in enumerate(pieces):
            view, offset = piece.data, start + index * row_bytes
            while view.nbytes:  # one call may return less: Linux moves at most 2 GiB
                try:
                    count = os.preadv(file.fileno(), [view], offset)
                except OSError as error:
                    raise ModelError(f"{entry.file}: reading tensor {name} at byte {offset} failed: {error}") from error
                if count == 0:
                    raise _truncated(name, entry, offset)
                view, offset = view[count:], offset + count
        with self._lock:
            self._bytes_read += out.nbytes

    def _open(self, name: str, entry: TensorEntry) -> FileIO:
        with self._lock:
            file = self._files.get(entry.file)
            if file is None:
                try:
                    file = self._files[entry.file] = Path(entry.file).open("rb", buffering=0)  # noqa: SIM115 (see `close`)
                except OSError as error:
                    raise ModelError(
                        f"{entry.file}: cannot be opened on {os.uname().nodename} to read tensor {name}"
                        f" ({error.strerror}); every node reads its own slices, so put the model at the same path on"
                        " each, or on a shared file system"
                    ) from error
        return file

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _truncated(name: str, entry: TensorEntry, size: int) -> ModelError:
    end = entry.offset + entry.num_bytes
    return ModelError(
        f"{entry.file}: truncated: tensor {name} takes bytes {entry.offset} to {end}, but the file ends at {size}; copy"
        " or download it again"
    )


def _check_interval(name: str, interval: Interval | None, size: int, granule: int) -> None:
    if interval is None:
        return
    if not 0 <= interval.start < interval.stop <= size:
        raise IndexError(f"{name}: the slice {interval.start}:{interval.stop} is not inside of a dimension of {size}")
    if granule and (interval.start % granule or interval.stop % granule):
        raise IndexError(
            f"{name}: the slice {interval.start}:{interval.stop} cuts a head of {granule} interleaved rows"
        )


def _decode(raw: Bytes, encoding: str) -> torch.Tensor:
    """Values of whole blocks: [rows, bytes] to [rows, values], of the stored dtype, or float32 where quantised."""
    dtype = DTYPES.get(encoding)
    if dtype is not None:
        return torch.from_numpy(raw).view(dtype)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    # As one long row: given many short ones, gguf walks over them sixteen at a time in Python.
    values = dequantize(raw.reshape(1, -1), GGMLQuantizationType[encoding])
    return torch.from_numpy(values).view(raw.shape[0], -1)


def _deinterleave(values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head from GGUF Llama's order to halves: [heads * head_dim, ...] to the same.

    The inverse of `permute` in llama.cpp's convert_hf_to_gguf.py, which prepares rows for rotation of neighbouring
    pairs.
    """
    heads = values.view(-1, head_dim // 2, 2, *values.shape[1:])
    return heads.transpose(1, 2).reshape(values.shape)
