"""Operators in a model's shapes, as `phalanx bench kernels` measures them, and those that issue a promise of their own:
prompts of many lengths, norms beside torch.compile, square products.

    PYTHONPATH=src python -m benchmarks.gpu_parts.kernels --model 8b [--json FILE]

PyTorch's attention prefers cuDNN here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchmarks.gpu_parts.readings import Readings
from torch.nn.attention import SDPBackend, sdpa_kernel

from phalanx import kernels
from phalanx.kernels.ceilings import Ceilings, measure_ceilings
from phalanx.launcher.bench_kernels.cases import CACHED_BYTES, EPS, MODELS, MOST_COPIES, Case, Maker, Sizes
from phalanx.launcher.bench_kernels.measure import read_case
from phalanx.launcher.bench_kernels.optional_peers import missing_peers

ROWS = (1, 16, 64, 512, 4096)
CONTEXTS = ((1, 1024), (1, 4096), (16, 1024), (16, 4096), (64, 4096))
PROMPTS = (512, 1024, 2048, 4096, 8192, 16384)
PROMPT_TOKENS = 16384  # of all prompts of a reading, as FlashAttention's papers measure
SQUARES = (2048, 4096, 8192)
PREFERRED = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class NormInputs(NamedTuple):
    """x, residual: [copies, T, H]."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def make(cls, maker: Maker, num_rows: int) -> NormInputs:
        hidden = maker.sizes.hidden
        copies = max(1, min(MOST_COPIES, CACHED_BYTES // (num_rows * hidden * maker.dtype.itemsize)))
        x, residual = torch.randn(2, copies, num_rows, hidden, device=maker.device, dtype=maker.dtype)
        return cls(x, residual, torch.randn(hidden, device=maker.device, dtype=maker.dtype))


def norm_beside_compiled(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Case:
    """Residual and RMSNorm beside what torch.compile makes of them."""

    @torch.compile(dynamic=False)
    def compiled(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return total, F.rms_norm(total, weight.shape, weight, EPS)

    return Case(
        "add_rms_norm beside torch.compile",
        f"{x.shape[1]} rows",
        lambda i: kernels.add_rms_norm(x[i], residual[i], weight, EPS),
        lambda i: compiled(x[i], residual[i]),
        len(x),
        4 * x[0].nbytes,
    )


def norm_to_fp8(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Case:
    return Case(
        "add_rms_norm fp8",
        f"{x.shape[1]} rows",
        lambda i: kernels.add_rms_norm_quantised(x[i], residual[i], weight, EPS, torch.float8_e4m3fn),
        None,
        len(x),
        3 * x[0].nbytes + x[0].numel(),
    )


def norm_cases(maker: Maker) -> Iterator[Case]:
    inputs = NormInputs.make(maker, 4096)
    yield norm_to_fp8(*inputs)
    yield norm_beside_compiled(*inputs)


def prompt_cases(maker: Maker) -> Iterator[Case]:
    for length in PROMPTS:
        count = PROMPT_TOKENS // length
        yield maker.attention_case([length] * count, [length] * count, f"prefill {count} x {length}")
        if length < 2048:
            yield maker.attention_case([length], [length], f"prefill 1 x {length}")


def square_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Of the output projection of a model that is as wide as its heads together."""
    for size in SQUARES:
        maker = Maker(Sizes(size, size // 128, 1, 128, size, 1), dtype, device, "linear o")
        for num_rows in (1, 16, size):
            yield from maker.product_cases(num_rows)


def quantised_square_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """4-bit weights at 8 to 64 rows, fp8 at few rows and at as many as there are outputs."""
    for size in (8192, 4096, 2048):
        sizes = Sizes(size, size // 128, 1, 128, size, 1)
        for num_rows in (8, 16, 64) if size >= 4096 else ():
            yield from Maker(sizes, dtype, device, "linear_w4a16 o").quantised_cases(num_rows)
        for num_rows in (8192,) if size == 8192 else (1, 16, 64):
            yield from Maker(sizes, dtype, device, "linear_fp8_w8a8 o").quantised_cases(num_rows)


def all_cases(model: str, dtype: torch.dtype, device: torch.device) -> list[Iterator[Case]]:
    """The promises first, for a time limit takes what comes last."""
    maker = Maker(MODELS[model], dtype, device)
    if model != "8b":
        return [maker.cases(ROWS, CONTEXTS)]
    return [
        maker._replace(only="paged_attention").cases((), CONTEXTS),
        norm_cases(maker),
        square_cases(dtype, device),
        quantised_square_cases(dtype, device),
        prompt_cases(maker),
        maker.cases(ROWS, ()),
    ]


def read(case: Case, ceilings: Ceilings, device: torch.device, rounds: int) -> dict[str, Any]:
    reading = read_case(case, ceilings, device, rounds)
    found: dict[str, Any] = {"us": reading.taken_us, "least_us": reading.least_us, "share": reading.share}
    if reading.peer_us is not None:
        found |= {
            "peer": reading.peer_name,
            "peer_us": reading.peer_us,
            "peer_over_this": reading.peer_us / reading.taken_us,
        }
    if case.num_flops:
        found["tflops"] = case.num_flops / reading.taken_us / 1e6
    return found


@torch.inference_mode()
def measure(
    readings: Readings, model: str, groups: Iterable[Iterator[Case]], ceilings: Ceilings, device: torch.device
) -> None:
    readings.put("ceilings", ceilings._asdict())
    readings.put("not installed", missing_peers())
    for cases in groups:
        try:
            for case in cases:
                at = {"model": model, "operator": case.operator, "load": case.load}
                readings.take("operators", at, partial(read, case, ceilings, device, 7))
                if readings.over:
                    return
        except Exception as error:  # it makes no more cases; those of the next group are still wanted
            readings.put("unmade", [*readings.figures.get("unmade", ()), f"{type(error).__name__}: {error}"[:400]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no reading is begun")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device, dtype = torch.device("cuda"), torch.bfloat16
    with sdpa_kernel(PREFERRED, set_priority=True):
        ceilings = measure_ceilings(device, dtype)
        cases = all_cases(arguments.model, dtype, device)
        measure(Readings(arguments.json, arguments.seconds), arguments.model, cases, ceilings, device)


if __name__ == "__main__":
    main()
