"""Which kernel multiplies a product on a GPU: what was measured on that GPU, and what to do where nothing was.

A table is a JSON file a GPU under `kernels/gpu/tuned`, which `python -m phalanx.kernels.tune_linear` writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

FOLDER = Path(__file__).resolve().parent / "gpu" / "tuned"
FARTHEST = 2.0  # doublings of m, n and k together, between a product and one whose reading stands for it
FEW_ROWS = 16  # of x, up to which what is untuned is multiplied by `stream_k`
MOST_SHARED = 64  # rows of x, up to which `stream_k` is tried, and multiplies by quantised weights

KernelName: TypeAlias = Literal["cublas", "stream_k", "persistent", "tiles"]
Held: TypeAlias = Literal["", "w4a16", "w8a16", "fp8_w8a16", "w8a8", "fp8_w8a8"]
"""How a weight is held, and what it is multiplied by: after `w` its bits, after `a` those of activations; "" as these.
"""

BOTH: tuple[Held, ...] = ("w8a8", "fp8_w8a8")
"""Of which activations are quantised, too."""


class Product(NamedTuple):
    """x [m, k] times weight [n, k], of a dtype by its name in torch. gated: whether n is pairs of a gate and what it is
    multiplied by, of which half as many outputs are made. held: of a weight that is quantised; then the dtype is that
    of the outputs, and the kernel `stream_k` or `tiles`.
    """

    dtype: str
    m: int
    n: int
    k: int
    gated: bool = False
    held: Held = ""

    def distance(self, other: Product) -> float:
        """In doublings; infinite where the one says nothing of the other."""
        if (self.dtype, self.gated, self.held) != (other.dtype, other.gated, other.held):
            return math.inf
        sizes, others = (self.m, self.n, self.k), (other.m, other.n, other.k)
        return sum(abs(math.log2(size) - math.log2(there)) for size, there in zip(sizes, others, strict=True))


@dataclass(frozen=True, slots=True)
class Choice:
    """A kernel and its tile. block_n: outputs, each a pair where the product is gated. per_sm: programs to a streaming
    multiprocessor, which share all tiles among them; `tiles` has one a tile. `cublas` has no tile of ours.
    """

    kernel: KernelName
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 0
    num_stages: int = 0
    per_sm: int = 1


CUBLAS = Choice("cublas")


class Reading(NamedTuple):
    """The best of what was tried on a product, and cuBLAS beside it."""

    choice: Choice
    best_us: float
    cublas_us: float


@dataclass(frozen=True)
class LinearTable:
    """Readings of one GPU. device: its name."""

    device: str
    readings: Mapping[Product, Reading] = field(default_factory=dict)

    def choose(self, product: Product) -> Choice:
        """By the nearest product that was measured, or by `untuned` where none is near."""
        nearest = min(self.readings, key=product.distance, default=None)
        if nearest is None or product.distance(nearest) > FARTHEST:
            return untuned(product)
        return self.readings[nearest].choice

    def with_readings(self, readings: Mapping[Product, Reading]) -> LinearTable:
        """This table with some measured anew."""
        return LinearTable(self.device, {**self.readings, **readings})

    def to_json(self) -> dict[str, Any]:
        rows = [
            {**product._asdict(), **asdict(choice), "best_us": best_us, "cublas_us": cublas_us}
            for product, (choice, best_us, cublas_us) in sorted(self.readings.items())
        ]
        return {"device": self.device, "readings": rows}

    @classmethod
    def from_json(cls, read: Mapping[str, Any]) -> LinearTable:
        return cls(read["device"], dict(_reading(row) for row in read["readings"]))

    def save(self, folder: Path = FOLDER) -> Path:
        """A row a line, so that a diff shows what was measured anew."""
        folder.mkdir(parents=True, exist_ok=True)
        path = _path(self.device, folder)
        rows = ",\n".join("  " + json.dumps(row) for row in self.to_json()["readings"])
        path.write_text(f'{{"device": {json.dumps(self.device)}, "readings": [\n{rows}\n]}}\n')
        return path


def load_table(device: str, folder: Path = FOLDER) -> LinearTable:
    """Of the GPU of that name; without readings where it was never measured."""
    path = _path(device, folder)
    return LinearTable.from_json(json.loads(path.read_text())) if path.exists() else LinearTable(device)


@cache
def table_of(device: str) -> LinearTable:
    """As `load_table` from the repository, read once."""
    return load_table(device)


def untuned(product: Product) -> Choice:
    """Few rows: by how long the weights take to read, so all of the GPU must read them. Many: cuBLAS, or of quantised
    weights a program a tile.
    """
    if product.held:
        if product.m <= MOST_SHARED:
            block_k = 128 if product.m <= 32 else 64
            return Choice("stream_k", _block_m(product.m), 64, block_k, num_warps=4, num_stages=4, per_sm=2)
        return Choice("tiles", 128, 128, 128 if product.held in BOTH else 64, num_warps=8, num_stages=3)
    if product.dtype not in ("bfloat16", "float16") or product.m > FEW_ROWS:
        return CUBLAS
    return Choice("stream_k", 16, 16 if product.gated else 32, 256, num_warps=4, num_stages=4, per_sm=2)


def candidates(product: Product) -> list[Choice]:
    """What is worth trying on a product, cuBLAS first; of a quantised weight, `untuned` first."""
    if product.held:
        return _quantised_candidates(product)
    tried = [CUBLAS]
    half = 2 if product.gated else 1  # two tiles of weights take the room of one twice as wide
    if product.m <= MOST_SHARED:
        block_m = _block_m(product.m)
        for block_n, block_k, num_stages in ((16, 256, 4), (32, 128, 5), (32, 256, 4), (64, 128, 4), (128, 64, 5)):
            for per_sm in (1, 2, 4):
                tried.append(Choice("stream_k", block_m, max(16, block_n // half), block_k, 4, num_stages, per_sm))
    if product.m > 32:
        for block_m, block_n, num_warps in ((64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)):
            for num_stages in (3, 4):
                tried.append(Choice("persistent", block_m, block_n // half, 64, num_warps, num_stages))
    return list(dict.fromkeys(tried))


def _quantised_candidates(product: Product) -> list[Choice]:
    tried = [untuned(product)]
    if product.m <= MOST_SHARED:
        for block_n, block_k, num_stages in ((64, 128, 3), (64, 256, 3), (128, 64, 4), (128, 128, 3)):
            for per_sm in (1, 2, 4):
                tried.append(Choice("stream_k", _block_m(product.m), block_n, block_k, 4, num_stages, per_sm))
    if product.m > 16:
        block_k = 128 if product.held in BOTH else 64
        for block_m, block_n, num_warps in ((32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 128, 8), (256, 128, 8)):
            for num_stages in (3, 4):
                tried.append(Choice("tiles", block_m, block_n, block_k, num_warps, num_stages))
    return list(dict.fromkeys(tried))


def _block_m(m: int) -> int:
    return max(16, 1 << (m - 1).bit_length())


def _reading(row: Mapping[str, Any]) -> tuple[Product, Reading]:
    product = Product(**{name: row[name] for name in Product._fields if name in row})
    choice = Choice(**{name: row[name] for name in Choice.__slots__})
    return product, Reading(choice, row["best_us"], row["cublas_us"])


def _path(device: str, folder: Path) -> Path:
    return folder / f"{device.lower().replace(' ', '-')}.json"
