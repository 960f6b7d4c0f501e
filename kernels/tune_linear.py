"""Measures which kernel multiplies fastest on this machine's GPU, and writes it down in its table.

    python -m phalanx.kernels.tune_linear [--model 1b] [--product 1,4096,4096] [--weights w4a16] [--minutes 8]

Each candidate is captured in a CUDA graph that goes through several weights, more than the L2 cache holds; the median
of replays counts. One whose numbers are not cuBLAS's, or that the GPU has no room for, is passed over. What the table
has already stays, unless it is measured anew. Quantised weights have groups of 128 inputs where they have 4 bits, else
a scale an output; cuBLAS beside them multiplies by weights that are not quantised.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from phalanx.kernels.activations import Activations, QuantisedActivations
from phalanx.kernels.linear_table import CUBLAS, FOLDER, Choice, Held, Product, Reading, candidates, load_table
from phalanx.kernels.quantise import quantise
from phalanx.kernels.quantised_rows import quantise_rows
from phalanx.kernels.quantised_weight import QuantisedWeight, WeightFormat
from phalanx.kernels.weight_on_gpu import make_quantised_on

Timer: TypeAlias = Callable[[Product, Choice], float]
"""Microseconds that a product takes by a choice; infinite where it cannot be taken."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
# (outputs, inputs, gated) of the products of a layer, and of the head.
MODELS = {
    "1b": ((3072, 2048, False), (2048, 2048, False), (16384, 2048, True), (2048, 8192, False), (128256, 2048, False)),
    "8b": ((6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False), (128256, 4096, False)),
    "square": tuple((size, size, False) for size in (1024, 2048, 4096, 8192)),
}
FORMATS: Mapping[Held, WeightFormat] = {
    "w4a16": WeightFormat(4, 128, torch.float16, offsets=True),
    "w8a16": WeightFormat(8),
    "fp8_w8a16": WeightFormat(8, e4m3=True),
    "w8a8": WeightFormat(8, activations=True),
    "fp8_w8a8": WeightFormat(8, e4m3=True, activations=True),
}
HEAD_ROWS = 64  # most of x for a head: of prompts only the last token has logits
TOLERANCE = 1e-2  # in the norm, of one kernel's numbers beside another's
_WEIGHTS_BYTES = 1 << 28  # five times the L2 cache of an H100
_REPLAYS = 7


def products_of(model: str, dtype: str, held: Held = "") -> list[Product]:
    """held: of the weights; the gates of quantised ones are not multiplied at once."""
    return [
        Product(dtype, m, n, k, gated and not held, held)
        for n, k, gated in MODELS[model]
        for m in ROWS
        if n < 100_000 or m <= HEAD_ROWS
    ]


def tune(
    products: Iterable[Product],
    time_us: Timer,
    *,
    may_go_on: Callable[[], bool] = lambda: True,
    told: Callable[[Product, Reading], None] = lambda product, reading: None,
) -> dict[Product, Reading]:
    """The best choice for each, until time is up."""
    readings: dict[Product, Reading] = {}
    for product in products:
        if not may_go_on():
            break
        cublas_us = time_us(product, CUBLAS)
        others = [choice for choice in candidates(product) if choice != CUBLAS]
        taken_us = {choice: time_us(product, choice) for choice in others}
        if not product.held:
            taken_us[CUBLAS] = cublas_us
        best = min(taken_us, key=taken_us.__getitem__)
        readings[product] = Reading(best, round(taken_us[best], 2), round(cublas_us, 2))
        told(product, readings[product])
    return readings


class GpuTimer:
    """Times products on the current CUDA device. Inputs are made once a product."""

    def __init__(self) -> None:
        self._product: Product | None = None

    def __call__(self, product: Product, choice: Choice) -> float:
        from triton.runtime.errors import OutOfResources, PTXASError

        from phalanx.kernels.gpu.linear import forced, multiply

        if product != self._product:
            self._make(product)
        gate = "silu" if product.gated else ""

        def one(number: int) -> torch.Tensor:
            if self._held and choice != CUBLAS:
                with forced(choice):
                    return self._held[number].multiply(self._quantised_x, None)
            return multiply(self._x, self._weights[number], gate=gate, choice=choice)

        def all_weights() -> None:
            for number in range(len(self._weights)):
                one(number)

        try:
            y = one(0).float()
        except (OutOfResources, PTXASError):
            return math.inf
        if choice == CUBLAS:
            self._expected = self._exact() if self._held else y
        elif not ((y - self._expected).norm() <= TOLERANCE * self._expected.norm()).item():
            return math.inf
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_weights()
        return self._median_us(graph) / len(self._weights)

    def _make(self, product: Product) -> None:
        dtype: torch.dtype = getattr(torch, product.dtype)
        count = max(1, math.ceil(_WEIGHTS_BYTES / (product.n * product.k * dtype.itemsize)))
        self._product = product
        self._x = torch.randn(product.m, product.k, device="cuda").to(dtype)
        self._weights = [
            (torch.randn(product.n, product.k, device="cuda") * product.k**-0.5).to(dtype)
            for _ in range(min(count, 256))
        ]
        self._quantised_x: Activations = self._x
        self._held: list[QuantisedWeight] = []
        if product.held:
            held = FORMATS[product.held]
            shape = product.n, product.k
            self._held = make_quantised_on(self._x.device, shape, held, dtype, [None] * len(self._weights))
            for weight, plain in zip(self._held, self._weights, strict=True):
                weight.put(0, quantise(plain, held))
            takes = self._held[0].takes
            if takes is not None:
                self._quantised_x = QuantisedActivations(*quantise_rows(self._x, takes))

    def _exact(self) -> torch.Tensor:
        """What the first of the quantised weights gives, in float32."""
        weight, x = self._held[0], self._quantised_x
        rows = x.q.float() * x.scales.unsqueeze(1) if isinstance(x, QuantisedActivations) else x.float()
        return rows @ weight[torch.arange(len(self._weights[0]), device=rows.device)].float().T

    def _median_us(self, graph: torch.cuda.CUDAGraph) -> float:
        taken_us: list[float] = []
        for _ in range(_REPLAYS + 1):  # the first warms up
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken_us.append(1e3 * start.elapsed_time(end))
        return statistics.median(taken_us[1:])


def parse_product(text: str, dtype: str, held: Held = "") -> Product:
    """ "m,n,k", with ",gated" where n is pairs, or ",w4a16" and the like where weights are quantised otherwise than
    `held`. Raises ValueError for anything else.
    """
    parts = text.split(",")
    gated = parts[-1] == "gated"
    held = next((name for name in FORMATS if name == parts[-1]), held)
    sizes = [int(part) for part in (parts[:-1] if gated or parts[-1] in FORMATS else parts)]
    if len(sizes) != 3 or min(sizes) < 1 or (gated and held):
        known = ", ".join(FORMATS)
        raise ValueError(
            f"{text!r} is no product; say m,n,k or m,n,k,gated, as in 16,28672,4096,gated, or in place of gated how "
            f"weights are quantised: {known}"
        )
    return Product(dtype, sizes[0], sizes[1], sizes[2], gated, held)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m phalanx.kernels.tune_linear",
        description="Measure which kernel multiplies fastest on this machine's GPU.",
    )
    parser.add_argument("--model", action="append", choices=list(MODELS), help="its products; may be repeated")
    parser.add_argument("--product", action="append", metavar="M,N,K[,gated]", default=[], help="may be repeated")
    parser.add_argument("--weights", choices=FORMATS, default="", help="quantised so; by default not")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no product is begun (default: 8)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the tables (default: %(default)s)")
    arguments = parser.parse_args(given)
    try:
        products = [parse_product(text, arguments.dtype, arguments.weights) for text in arguments.product]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        sys.exit("nothing to tune: PyTorch sees no GPU here; run this on the machine whose GPU is to be tuned")
    for model in arguments.model or ([] if products else MODELS):
        products += products_of(model, arguments.dtype, arguments.weights)
    table = load_table(torch.cuda.get_device_name(), arguments.folder)
    ends_s = time.monotonic() + 60 * arguments.minutes

    def tell(product: Product, reading: Reading) -> None:
        nonlocal table
        table = table.with_readings({product: reading})
        table.save(arguments.folder)  # each at once: whoever stops this keeps what was measured
        size = f"{product.m} x {product.n} x {product.k}{' gated' if product.gated else ''} {product.held}".rstrip()
        print(f"{size:34} {reading.choice.kernel:10} {reading.best_us:9.2f} us, cuBLAS {reading.cublas_us:9.2f} us")

    with torch.inference_mode():
        readings = tune(products, GpuTimer(), may_go_on=lambda: time.monotonic() < ends_s, told=tell)
    path = table.save(arguments.folder)
    print(f"{len(readings)} of {len(products)} products measured, written: {path}")


if __name__ == "__main__":
    main()
