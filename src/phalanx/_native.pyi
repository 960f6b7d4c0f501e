"""C++, built where there is a compiler. Tensors come as addresses, dtypes as `phalanx.comm.shm_calls` counts them."""

from collections.abc import Mapping, Sequence

instruction_set: str

# (end, rank, header, expected), see `End` in `comm/csrc/waiter.hpp`; None where all went well.
_Failure = tuple[int, int, int, int] | None

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
        /,
    ) -> None: ...
    def all_reduce(self, x: int, num_bytes: int, dtype: int, maximum: bool, timeout_s: float, /) -> _Failure: ...
    def all_reduce_rms_norm(
        self,
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
    ) -> _Failure: ...
    def all_gather(self, output: int, x: int, counts: Sequence[int], dtype: int, timeout_s: float, /) -> _Failure: ...
    def reduce_scatter(
        self, output: int, x: int, counts: Sequence[int], dtype: int, timeout_s: float, /
    ) -> _Failure: ...
    def broadcast(self, x: int, num_bytes: int, dtype: int, root: int, timeout_s: float, /) -> _Failure: ...
    def barrier(self, timeout_s: float, /) -> _Failure: ...
    def send(self, x: int, num_bytes: int, dtype: int, to: int, timeout_s: float, /) -> _Failure: ...
    def recv(self, x: int, num_bytes: int, dtype: int, source: int, timeout_s: float, /) -> _Failure: ...

def combine(out: int, parts: Sequence[int], count: int, dtype: int, maximum: bool, /) -> None: ...
