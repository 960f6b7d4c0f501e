"""What a layout costs: one request through SmolLM2-135M in several layouts on this machine, transformers beside them.

    python benchmarks/layouts.py [--rounds 3] [--new-tokens 64] [--json FILE]

The layouts and the peer take turns in every round, so that a machine whose speed drifts treats them alike; the figures
are medians over the rounds, and the ratio is to the peer in the same run. Each reading is a process of its own: thread
pools that another library leaves behind would slow down whatever comes after it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from phalanx import LLM, SamplingParams
from phalanx.models.resolve import resolve_model

MODEL = "smollm2-135m"
PEER = "transformers"
PROMPT_TOKENS = 64
LAYOUTS: dict[str, dict[str, Any]] = {
    "1 x 1": {},
    "tensor 2": {"tensor": 2},
    "tensor 3": {"tensor": 3},
    "pipeline 2": {"pipeline": 2},
    "2 x 2": {"tensor": 2, "pipeline": 2},
    "3 + 1": {"stages": [{"tensor": 3}, {"tensor": 1}]},
}


class Reading(NamedTuple):
    """Seconds. start_s: until it could take a request. first_s: to the first token. token_s: mean of the others."""

    start_s: float
    first_s: float
    token_s: float


def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 40000, (PROMPT_TOKENS,), generator=generator).tolist()


def run_layout(parallel: dict[str, Any], dtype: str, num_tokens: int) -> Reading:
    started = time.perf_counter()
    with LLM(model={"path": MODEL, "dtype": dtype}, cluster={"ray": "none", "device": "cpu"}, parallel=parallel) as llm:
        start_s = time.perf_counter() - started
        llm.generate([prompt()[:8]], SamplingParams(max_tokens=4, ignore_eos=True))
        timings = llm.generate([prompt()], SamplingParams(max_tokens=num_tokens, ignore_eos=True))[0].timings
    return Reading(start_s, timings.time_to_first_token_s, timings.time_per_output_token_s)


def run_transformers(dtype: str, num_tokens: int) -> Reading:
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = Path(resolve_model(MODEL).location)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    start_s = time.perf_counter() - started
    inputs = torch.tensor([prompt()])

    def generate(count: int) -> float:
        began = time.perf_counter()
        model.generate(inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - began

    generate(4)
    first_s = generate(1)
    return Reading(start_s, first_s, (generate(num_tokens) - first_s) / (num_tokens - 1))


def read_apart(name: str, dtype: str, num_tokens: int) -> Reading:
    """One reading, in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--dtype", dtype, "--new-tokens", str(num_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return Reading(*json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", choices=(PEER, *LAYOUTS), help="take one reading here and print it as JSON")
    arguments = parser.parse_args()
    dtype, num_tokens = arguments.dtype, arguments.new_tokens

    if arguments.one is not None:
        if arguments.one == PEER:
            print(json.dumps(run_transformers(dtype, num_tokens)))
        else:
            print(json.dumps(run_layout(LAYOUTS[arguments.one], dtype, num_tokens)))
        return
    readings: dict[str, list[Reading]] = {name: [] for name in (PEER, *LAYOUTS)}
    console = Console(stderr=True)
    for number in range(arguments.rounds):
        for name, taken in readings.items():
            with console.status(f"round {number + 1} of {arguments.rounds}: {name}"):
                taken.append(read_apart(name, dtype, num_tokens))

    medians = {
        name: Reading(*(statistics.median(column) for column in zip(*values, strict=True)))
        for name, values in readings.items()
    }
    table = Table("layout", "start s", "first token ms", "ms a token", "peer's / ours", box=None)
    for name, median in medians.items():
        table.add_row(
            name,
            f"{median.start_s:.1f}",
            f"{median.first_s * 1e3:.0f}",
            f"{median.token_s * 1e3:.1f}",
            f"{medians[PEER].token_s / median.token_s:.2f}",
        )
    Console().print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "layouts",
            "command": f"benchmarks/layouts.py --rounds {arguments.rounds} --new-tokens {num_tokens} --dtype {dtype}",
            "model": MODEL,
            "dtype": dtype,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": num_tokens,
            "rounds": arguments.rounds,
            "machine": {
                "threads": torch.get_num_threads(),
                "processor": platform.machine(),
                "torch": torch.__version__,
            },
            "readings": {name: [reading._asdict() for reading in values] for name, values in readings.items()},
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
