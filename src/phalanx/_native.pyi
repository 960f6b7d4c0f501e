"""C++, built where there is a compiler. Tensors come as addresses, dtypes as `phalanx.comm.shm_calls` counts them, but
where types say otherwise.
"""

from collections.abc import Mapping, Sequence

import torch

instruction_sets: tuple[str, ...]  # that this processor has, the best first, which is taken

# Where all went well who arrived last, -1 where that does not show; else (end, rank, header, expected), see `End` in
# `comm/csrc/waiter.hpp`.
_Ended = int | tuple[int, int, int, int]

class Group:
    def __init__(
        self,
        owner: object,
        address: int,
        layout: Mapping[str, int],
        rank: int,
        pidfds: Sequence[int],
        may_spin: bool,
        window: int,
        tensor_type: type,
        /,
    ) -> None: ...
    # None, and nothing is done, where the tensors are not of the CPU, contiguous and of dtypes that it adds up.
    def all_reduce(self, x: torch.Tensor, maximum: bool, timeout_s: float, /) -> _Ended | None: ...
    def all_reduce_rms_norm(
        self,
        x: torch.Tensor,
        sums: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        timeout_s: float,
        /,
    ) -> _Ended | None: ...
    def record_all_reduce(
        self, transfers: Transfers, x: int, num_bytes: int, dtype: int, maximum: bool, timeout_s: float, /
    ) -> None: ...
    def record_all_reduce_rms_norm(
        self,
        transfers: Transfers,
        x: int,
        sums: int,
        residual: int,
        weight: int,
        eps: float,
        num_rows: int,
        width: int,
        dtype: int,
        timeout_s: float,
        /,
    ) -> None: ...
    def all_gather(self, output: int, x: int, counts: Sequence[int], dtype: int, timeout_s: float, /) -> _Ended: ...
    def reduce_scatter(self, output: int, x: int, counts: Sequence[int], dtype: int, timeout_s: float, /) -> _Ended: ...
    def broadcast(self, x: int, num_bytes: int, dtype: int, root: int, timeout_s: float, /) -> _Ended: ...
    def barrier(self, timeout_s: float, /) -> _Ended: ...
    def send(self, x: int, num_bytes: int, dtype: int, to: int, timeout_s: float, /) -> _Ended: ...
    def recv(self, x: int, num_bytes: int, dtype: int, source: int, timeout_s: float, /) -> _Ended: ...

class Transfers:
    """Those of a program. position: odd within one; half of it, how many of the run have ended."""

    def __init__(self) -> None: ...
    def begin(self) -> None: ...
    @property
    def position(self) -> int: ...
    def times(self, count: int, /) -> list[tuple[float, float, int]]: ...  # of the first: started, ended, last
    def outcome(self, index: int, /) -> tuple[int, int, int, int]: ...  # (end, rank, header, expected)

# instructions: which of `instruction_sets`.
def combine(
    out: int, parts: Sequence[int], count: int, dtype: int, maximum: bool, instructions: int = 0, /
) -> None: ...

# The operators of `kernels`: addresses, shapes, strides in elements, and the dtype as `phalanx.kernels.native_cpu` has
# it. instructions: which of `instruction_sets`.
def rms_norm(
    normed: int,
    x: int,
    x_stride: int,
    weight: int,
    eps: float,
    num_rows: int,
    width: int,
    dtype: int,
    instructions: int = 0,
    /,
) -> None: ...
def add_rms_norm(
    normed: int,
    total: int,
    x: int,
    residual: int,
    weight: int,
    eps: float,
    num_rows: int,
    width: int,
    dtype: int,
    instructions: int = 0,
    /,
) -> None: ...
def gated_mul(
    out: int, gate_up: int, num_rows: int, width: int, gelu: bool, dtype: int, instructions: int = 0, /
) -> None: ...
def rope_and_write_kv(
    heads: int,
    cos: int,
    sin: int,
    query_norm: int,
    key_norm: int,
    eps: float,
    keys: int,
    values: int,
    key_scales: int,
    value_scales: int,
    slots: int,
    page_size: int,
    page_stride: int,
    slot_stride: int,
    head_stride: int,
    num_rows: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    dtype: int,
    pages: int,
    instructions: int = 0,
    /,
) -> None: ...
def argmax(columns: int, x: int, num_rows: int, width: int, instructions: int = 0, /) -> None: ...
def argmax_keys(keys: int, x: int, num_rows: int, width: int, first: int, instructions: int = 0, /) -> None: ...
def widen(out: int, x: int, count: int, /) -> None: ...
def top(values: int, columns: int, x: int, num_rows: int, width: int, count: int, instructions: int = 0, /) -> None: ...

class CallWatch:
    """The operators that this thread calls between `begin` and `end`."""

    def __init__(self) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    # Those since the last time: operator, sizes, bytes, operations, address of the weight, started, ended.
    def take(self) -> list[tuple[str, tuple[int, ...], float, float, int, float, float]]: ...

class Program:
    """Calls of operators: those of this thread between `begin` and `end`, made again by `run`."""

    def __init__(self) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def run(self) -> bool: ...

def rope_table(
    cos: int, sin: int, positions: int, frequencies: int, num_rows: int, half: int, dtype: int, /
) -> None: ...
def token_places(
    places: int,
    tables: int,
    table_stride: int,
    table: Sequence[int],
    num_new: Sequence[int],
    lengths: Sequence[int],
    page_size: int,
    /,
) -> None: ...

class HeadLists:
    def __init__(self, kv_of_query: Sequence[int], num_kv_heads: int, /) -> None: ...

class AttentionSteps:
    def __init__(
        self,
        tables: int,
        table_stride: int,
        table: Sequence[int],
        num_new: Sequence[int],
        lengths: Sequence[int],
        window: int,
        /,
    ) -> None: ...
    def move(
        self,
        tables: int,
        table_stride: int,
        table: Sequence[int],
        num_new: Sequence[int],
        lengths: Sequence[int],
        window: int,
        /,
    ) -> None: ...
    def copy(self) -> AttentionSteps: ...
    def become(self, other: AttentionSteps, /) -> None: ...
    def attend(
        self,
        heads: HeadLists,
        out: int,
        query: int,
        keys: int,
        values: int,
        key_scales: int,
        value_scales: int,
        query_stride: int,
        out_stride: int,
        page_size: int,
        page_stride: int,
        slot_stride: int,
        head_stride: int,
        scales_stride: int,
        head_dim: int,
        scale: float,
        softcap: float,
        dtype: int,
        pages: int,
        instructions: int = 0,
        /,
    ) -> None: ...

# Threads that the operators share, the caller included; 1 at first. Waits for the operator under way.
def resize_pool(num_threads: int) -> None: ...
def pool_size() -> int: ...

# Of `instruction_sets`, those that have products, the best first; instructions: which of them. See
# `kernels/csrc/linear.hpp`.
linear_sets: tuple[str, ...]

# weight: the address of a `PackedMatrix`.
def linear(y: int, x: int, x_stride: int, weight: int, bias: int, num_rows: int, instructions: int = 0) -> None: ...

# See `kernels/csrc/packed.hpp`.
class PackedMatrix:
    address: int
    num_bytes: int
    num_blocks: int
    num_plain: int
    def __init__(self, num_outputs: int, num_inputs: int, room: int) -> None: ...
    @staticmethod
    def room_bytes(num_outputs: int, num_inputs: int) -> int: ...
    def put(self, rows: int, first: int, num_rows: int) -> None: ...
    def take_rows(self, out: int, indices: int, count: int) -> None: ...
    def take_held_rows(self, out: int, indices: int, count: int, first: int) -> None: ...

# See `kernels/csrc/quantised.hpp`. weight: the address of a `QuantisedMatrix`.
def quantised_linear(
    y: int, x: int, x_stride: int, weight: int, bias: int, num_rows: int, instructions: int = 0
) -> None: ...

# bits, group_size, scales (a `ScaleType`), offsets, zeros, numbers (a `NumberType`)
_FormatParts = tuple[int, int, int, bool, bool, int, int]

class QuantisedMatrix:
    address: int
    def __init__(
        self, num_outputs: int, num_inputs: int, held: _FormatParts, room: int, x_inputs: int, order: list[int]
    ) -> None: ...
    @staticmethod
    def room_bytes(num_outputs: int, num_inputs: int, held: _FormatParts) -> int: ...
    def put(self, q: int, scales: int, offsets: int, zeros: int, first: int, num_rows: int) -> None: ...
    def take_held_rows(self, out: int, indices: int, count: int, first: int) -> None: ...

# See `kernels/csrc/memory.hpp`.
def advise_huge_pages(memory: int, num_bytes: int) -> bool: ...
def read_memory(memory: int, num_bytes: int) -> int: ...
