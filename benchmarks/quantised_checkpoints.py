"""What the checkpoints lose that `phalanx quantize` writes: AWQ beside rounding to nearest.

    python benchmarks/quantised_checkpoints.py [--model smollm2-135m] [--windows 8] [--group-sizes 32 64]
        [--json FILE]

Against the same model in float32, all computed in float32, so that only the rounding of weights counts: perplexity,
the Kullback-Leibler divergence of the distribution of the next token, and how often the likeliest token is the same, on
the texts of Python's own `help`. AWQ's activations are of another text, `models.calibration.default_text`.

The built-in model is a GGUF file in Q4_1: its weights lie on a grid of 16 steps for 32 inputs already, which groups of
32 can nearly find again. Larger groups, of which each covers several of its scales, cannot.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.quantised import Case, Model, Quality, judge, windows  # noqa: E402
from benchmarks.report import write_report  # noqa: E402

from phalanx.models.quantise_model import QuantiseOptions, quantise_model  # noqa: E402
from phalanx.models.resolve import ModelSource, resolve_model  # noqa: E402
from phalanx.native import resize_pool  # noqa: E402


class Reading(NamedTuple):
    """seconds: that quantising took. file_bytes: of the tensors written."""

    quality: Quality
    seconds: float
    file_bytes: int


def logprobs(source: ModelSource, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    model = Model(source, Case("none", torch.float32))
    return [model.logprobs(tokens) for tokens in texts]


def read(source: ModelSource, count: int, group_sizes: list[int], console: Console) -> dict[str, Reading]:
    texts = list(windows(source, count))
    reference = logprobs(source, texts)
    cases = {"int8": QuantiseOptions("int8"), "fp8": QuantiseOptions("fp8")}
    for size in group_sizes:
        cases[f"int4, {size} inputs, to nearest"] = QuantiseOptions("int4", size, awq=False)
        cases[f"int4, {size} inputs, AWQ"] = QuantiseOptions("int4", size, awq=True)
    found = {}
    for name, options in cases.items():
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "model"
            start = time.perf_counter()
            made = quantise_model(source, directory, options)
            seconds = time.perf_counter() - start
            told = logprobs(resolve_model(str(directory)), texts)
        found[name] = Reading(judge(told, reference, texts, made.num_bytes), seconds, made.num_bytes)
        console.print(f"{name}: {found[name]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    resize_pool(2)
    torch.set_num_threads(2)
    readings = read(resolve_model(arguments.model), arguments.windows, arguments.group_sizes, Console(stderr=True))
    table = Table("checkpoint", "MiB", "perplexity", "divergence", "same token", "seconds", box=None)
    for name, (quality, seconds, file_bytes) in readings.items():
        row = [name, f"{file_bytes / 2**20:.0f}", f"{quality.perplexity:.3f}", f"{quality.divergence:.5f}"]
        table.add_row(*row, f"{quality.same:.1%}", f"{seconds:.0f}")
    Console().print(table)
    if arguments.json is not None:
        write_report(
            arguments.json,
            "quantised_checkpoints",
            model=arguments.model,
            readings={name: each._asdict() | {"quality": each.quality._asdict()} for name, each in readings.items()},
        )


if __name__ == "__main__":
    main()
