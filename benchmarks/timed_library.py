"""A proxy around the native library: times its operators, and knows the least that each must move and multiply."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from phalanx.kernels import PackedWeight

ITEM = 2  # bytes of a bfloat16 number


class Rates(NamedTuple):
    """Of reading memory, and of multiplying and adding."""

    bytes_per_s: float
    products_per_s: float


class Operator:
    """Calls of one kind in some steps: how many, how long, and the least that they must move and multiply."""

    def __init__(self) -> None:
        self.calls = 0
        self.taken_s = 0.0
        self.num_bytes = 0.0
        self.num_products = 0.0
        self.limit_s = 0.0


Work = Callable[..., tuple[str, float, float]]
"""From the arguments of a call: its name, bytes and operations."""

WORK: dict[str, Work] = {
    "rms_norm": lambda to, x, stride, w, eps, rows, width, *_: ("rms_norm", 2 * ITEM * rows * width, 0.0),
    "add_rms_norm": lambda to, total, x, residual, w, eps, rows, width, *_: (
        "add_rms_norm",
        4 * ITEM * rows * width,
        0.0,
    ),
    "gated_mul": lambda out, x, rows, width, *_: ("gated_mul", 3 * ITEM * rows * width, 0.0),
    "rope_and_write_kv": lambda *a: ("rope_and_write_kv", 2 * ITEM * a[13] * (a[14] + 2 * a[15]) * a[16], 0.0),
    "rope_table": lambda cos, sin, positions, w, rows, half, *_: ("rope_table", 4 * ITEM * rows * half, 0.0),
    "widen": lambda out, x, numbers: ("widen", 3 * ITEM * numbers, 0.0),
    "argmax": lambda columns, x, rows, width, *_: ("argmax", 4 * rows * width, 0.0),
}


class TimedLibrary:
    """The native library, every call of `WORK`, of products by `weights` and of attention timed."""

    def __init__(self, library: Any, rates: Rates, weights: Iterable[PackedWeight] = ()) -> None:
        self._library = library
        self._rates = rates
        self._weights = {weight._address: weight for weight in weights}
        self.operators: dict[str, Operator] = defaultdict(Operator)
        if self._weights:
            self.linear = self.timed(library.linear, self._product)

    def _product(
        self, y: int, x: int, stride: int, address: int, bias: int, rows: int, *_: int
    ) -> tuple[str, float, float]:
        weight = self._weights[address]
        out, inputs = weight.shape
        num_bytes = weight.nbytes + ITEM * rows * (out + inputs)
        return f"linear {out}x{inputs}", num_bytes, 2.0 * rows * out * inputs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        if name == "AttentionSteps":
            return lambda *arguments: TimedSteps(found(*arguments), arguments, self)
        if name in WORK:
            found = self.timed(found, WORK[name])
            setattr(self, name, found)
        return found

    def timed(self, call: Callable[..., object], work: Work) -> Callable[..., object]:
        def run(*arguments: Any) -> object:
            began_s = time.perf_counter()
            result = call(*arguments)
            taken_s = time.perf_counter() - began_s
            name, num_bytes, num_products = work(*arguments)
            operator = self.operators[name]
            operator.calls += 1
            operator.taken_s += taken_s
            operator.num_bytes += num_bytes
            operator.num_products += num_products
            operator.limit_s += max(num_bytes / self._rates.bytes_per_s, num_products / self._rates.products_per_s)
            return result

        return run


class TimedSteps:
    """Who attends to what in a step; see `kernels/paged_attention.py`."""

    def __init__(self, steps: Any, made_from: tuple[Any, ...], library: TimedLibrary) -> None:
        _, _, _, num_new, lengths, _ = made_from
        seen = sum(new * (length - new) + new * (new + 1) // 2 for new, length in zip(num_new, lengths, strict=True))

        def work(*arguments: Any) -> tuple[str, float, float]:
            out_stride, slot_stride = arguments[6], arguments[9]
            num_bytes = 2 * ITEM * (sum(lengths) * slot_stride + sum(num_new) * out_stride)
            return "paged_attention", num_bytes, 4.0 * seen * out_stride

        self.attend = library.timed(steps.attend, work)


def proxy_seconds(rates: Rates) -> float:
    """What timing a call takes, beside the time that it is found to take."""
    calls = 2000
    library = TimedLibrary(None, rates)
    nothing = library.timed(lambda *_: None, WORK["add_rms_norm"])
    began_s = time.perf_counter()
    for _ in range(calls):
        nothing(0, 0, 0, 0, 0, 1e-5, 1, 576, 0)
    return (time.perf_counter() - began_s - library.operators["add_rms_norm"].taken_s) / calls


def bandwidth(library: Any) -> float:
    """Of reading memory with large pages, as weights lie in, bytes a second: the fastest of several passes."""
    x = torch.empty(2**27, dtype=torch.bfloat16)
    library.advise_huge_pages(x.data_ptr(), x.nbytes)
    x.fill_(1)
    taken_s = []
    for _ in range(6):
        began_s = time.perf_counter()
        library.read_memory(x.data_ptr(), x.nbytes)
        taken_s.append(time.perf_counter() - began_s)
    return x.nbytes / min(taken_s)
