"""Whether every scheme gives the same greedy tokens in every layout, through real processes.

    python benchmarks/quantised_layouts.py [--dtype float32] [--new-tokens 20] [--schemes int8,w8a8] [--json FILE]

The layouts are those of `tests/test_golden_layouts.py`, which holds unquantised weights to transformers; here every
layout is held to one rank, with the same weights of `smollm2-135m`, prompts and settings. Where tokens differ, it says
from which on, and by how much the likeliest token led there on one rank, as a difference of log-probabilities: a tie
that the last bits of a sum decide has next to none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import write_report  # noqa: E402

from phalanx import LLM, SamplingParams  # noqa: E402

SCHEMES = ("none", "stored", "int8", "int4", "fp8", "w8a8", "w4a8")
ONE: dict[str, Any] = {}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {"tensor": 2},
    "tensor 3": {"tensor": 3},
    "tensor 4": {"tensor": 4},
    "tensor 5": {"tensor": 5},
    "pipeline 2": {"pipeline": 2},
    "pipeline 3": {"pipeline": 3},
    "2 x 2": {"tensor": 2, "pipeline": 2},
    "3 + 1": {"stages": [{"tensor": 3, "layers": 22}, {"tensor": 1, "layers": 8}]},
    "1 + 2 + 1": {"stages": [{"layers": 7}, {"tensor": 2, "layers": 13}, {"tensor": 1, "layers": 10}]},
    "2 : 1": {"stages": [{"tensor": 2, "weights": [2, 1]}]},
}
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Three ways in which a river differs from a canal: first, a river finds its own way to the sea, while",
    "Once upon a time " + "there was a small stone bridge, and under it lived a heron who counted boats. " * 28,
)


class Generated(NamedTuple):
    """Greedy tokens of a prompt, and by how much each led before the second likeliest, in log-probability."""

    tokens: tuple[int, ...]
    leads: tuple[float, ...]


class Agreement(NamedTuple):
    """same: prompts whose tokens are all those of one rank. differences: of the others, the prompt's number, the first
    token that differs, and by how much it had led on one rank.
    """

    scheme: str
    layout: str
    same: int
    differences: tuple[tuple[int, int, float], ...]


def greedy(scheme: str, dtype: str, parallel: dict[str, Any], num_tokens: int) -> list[Generated]:
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, logprobs=2)
    with LLM(
        model={"path": "smollm2-135m", "dtype": dtype, "quantization": scheme},
        cluster={"ray": "none", "device": "cpu"},
        parallel=parallel,
        engine={"kv_cache": "128MiB", "max_batch_tokens": 300},
    ) as llm:
        outputs = llm.generate(PROMPTS, params)
    found = []
    for output in outputs:
        tops = [each.top for each in output.logprobs or ()]
        found.append(Generated(output.token_ids, tuple(first[1] - second[1] for first, second in tops)))
    return found


def compare(scheme: str, layout: str, alone: Sequence[Generated], cut: Sequence[Generated]) -> Agreement:
    differences = []
    for number, (one, other) in enumerate(zip(alone, cut, strict=True)):
        if one.tokens != other.tokens:
            first = next(
                place for place, pair in enumerate(zip(one.tokens, other.tokens, strict=True)) if pair[0] != pair[1]
            )
            differences.append((number, first, one.leads[first]))
    return Agreement(scheme, layout, len(alone) - len(differences), tuple(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(SCHEMES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    found: list[Agreement] = []
    for scheme in arguments.schemes:
        alone = greedy(scheme, arguments.dtype, ONE, arguments.new_tokens)
        for layout, parallel in LAYOUTS.items():
            cut = greedy(scheme, arguments.dtype, parallel, arguments.new_tokens)
            found.append(compare(scheme, layout, alone, cut))
            console.print(found[-1])
    table = Table("weights", *LAYOUTS, box=None, title=f"prompts of {len(PROMPTS)} whose tokens are those of one rank")
    for scheme in arguments.schemes:
        table.add_row(scheme, *(str(each.same) for each in found if each.scheme == scheme))
    Console(width=150).print(table)
    if arguments.json is not None:
        write_report(
            arguments.json,
            "quantised_layouts",
            dtype=arguments.dtype,
            new_tokens=arguments.new_tokens,
            prompts=len(PROMPTS),
            agreements=[each._asdict() for each in found],
        )


if __name__ == "__main__":
    main()
