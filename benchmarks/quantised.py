"""What quantised weights, and a KV cache in 8 bits, cost and gain.

    python benchmarks/quantised.py [--model smollm2-135m] [--windows 8] [--rounds 5] [--scale 1.0] [--quality-only]
        [--json FILE]

Quality: on windows of 512 tokens of the texts of Python's own `help`, against the same model in float32: perplexity,
the Kullback-Leibler divergence of the distribution of the next token, and how often the likeliest token is the same.
The cache in 8 bits is read by every token of a window, beside weights in bfloat16.
Speed: engines of one rank and two threads take turns at W1, W2 and prompts of W3 in bfloat16, in an order that is
reversed from round to round; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import pydoc_data.topics
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import write_report  # noqa: E402
from benchmarks.tensor import Reading, engine_of, gain, measure  # noqa: E402

from phalanx.comm.group import GroupSpec  # noqa: E402
from phalanx.comm.single import SingleCommunicator  # noqa: E402
from phalanx.kernels import KV_DTYPES, choose_packing, plan_attention  # noqa: E402
from phalanx.models.batch import Batch, KVCache, Part  # noqa: E402
from phalanx.models.checkpoint import Checkpoint  # noqa: E402
from phalanx.models.decoder import Decoder  # noqa: E402
from phalanx.models.params import rank_params  # noqa: E402
from phalanx.models.resolve import ModelSource, resolve_model  # noqa: E402
from phalanx.models.weights import load_params  # noqa: E402
from phalanx.native import resize_pool  # noqa: E402
from phalanx.parallel.layout import StageRequest, build_layout  # noqa: E402

CPU = torch.device("cpu")
WINDOW = 512
PAGE_SIZE = 16
SCHEMES = ("none", "stored", "int8", "w8a8", "int4", "w4a8", "fp8")


class Case(NamedTuple):
    """quantization, kv_cache_dtype: as the settings of that name."""

    quantization: str = "none"
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: str = "auto"


class Quality(NamedTuple):
    """perplexity: of the text. divergence: mean Kullback-Leibler divergence from the reference, in nats. same: share of
    positions whose likeliest token is the reference's. weight_bytes: of the model.
    """

    perplexity: float
    divergence: float
    same: float
    weight_bytes: int


class Model:
    """A whole model on one rank."""

    def __init__(self, source: ModelSource, case: Case) -> None:
        config, dtype = source.config, case.dtype
        layout = build_layout(config.shape, [StageRequest(1)])
        [place] = layout.places()
        comm = SingleCommunicator(GroupSpec(0, 1))
        packed = choose_packing(dtype, CPU).usable
        with Checkpoint(source.entries()) as checkpoint:
            weights = load_params(
                rank_params(config, layout, place),
                checkpoint,
                dtype,
                CPU,
                packed=packed,
                quantization=case.quantization,
            )
        self.weight_bytes = sum(weight.nbytes for weight in weights.values())
        self._decoder = Decoder(config, layout.stages[0], 0, comm, weights)
        shape = config.shape
        self._cache = KVCache(
            shape.num_layers,
            WINDOW // PAGE_SIZE,
            PAGE_SIZE,
            shape.num_kv_heads,
            shape.head_dim,
            dtype,
            CPU,
            case.kv_cache_dtype,
        )
        table = torch.arange(WINDOW // PAGE_SIZE).unsqueeze(0)
        attention = plan_attention(
            table, [WINDOW], [WINDOW], page_size=PAGE_SIZE, window=config.sliding_window, device=CPU
        )
        positions = torch.arange(WINDOW)
        self._batch = Batch((Part(positions, positions, attention),), None)

    def logprobs(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [WINDOW] -> [WINDOW, vocabulary] float32."""
        with torch.inference_mode():
            hidden = self._decoder(tokens, self._batch, self._cache)
            return F.log_softmax(self._decoder.logits(hidden, None).float(), dim=-1)


def windows(source: ModelSource, count: int) -> Iterator[torch.Tensor]:
    text = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    tokens = torch.tensor(source.tokenizer().encode(text[: 20 * WINDOW * count]))
    for number in range(count):
        yield tokens[number * WINDOW : (number + 1) * WINDOW]


def read_quality(source: ModelSource, count: int, console: Console) -> dict[str, Quality]:
    cases = {"float32": Case(dtype=torch.float32)} | {name: Case(name) for name in SCHEMES}
    for kv_cache_dtype in KV_DTYPES:
        cases[f"KV {kv_cache_dtype}"] = Case(kv_cache_dtype=kv_cache_dtype)
        cases[f"KV {kv_cache_dtype}, float32"] = Case(dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)
    texts = list(windows(source, count))
    reference: list[torch.Tensor] = []
    found: dict[str, Quality] = {}
    for name, case in cases.items():
        model = Model(source, case)
        told = [model.logprobs(tokens) for tokens in texts]
        reference = reference or told
        found[name] = judge(told, reference, texts, model.weight_bytes)
        console.print(f"{name}: {found[name]}")
    return found


def judge(
    told: list[torch.Tensor], reference: list[torch.Tensor], texts: list[torch.Tensor], weight_bytes: int
) -> Quality:
    """told, reference: log probabilities of each text, [WINDOW, vocabulary]."""
    pairs = list(zip(told, reference, strict=True))
    losses = [-each[:-1].gather(1, tokens[1:, None]) for each, tokens in zip(told, texts, strict=True)]
    divergences = [F.kl_div(each, exact, log_target=True, reduction="none").sum(-1) for each, exact in pairs]
    same = [each.argmax(-1) == exact.argmax(-1) for each, exact in pairs]
    return Quality(
        perplexity=float(torch.cat(losses).mean().exp()),
        divergence=float(torch.cat(divergences).mean()),
        same=float(torch.cat(same).float().mean()),
        weight_bytes=weight_bytes,
    )


def read_speed(model: str, rounds: int, scale: float, console: Console) -> dict[str, list[Reading]]:
    with ExitStack() as closes:
        engines = {
            name: closes.enter_context(closing(engine_of(model, "bfloat16", 2, {}, quantization=name)))
            for name in SCHEMES
        }
        return asyncio.run(measure(engines, rounds, scale, console))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="times all lengths of the workloads in tokens")
    parser.add_argument("--quality-only", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    resize_pool(2)
    torch.set_num_threads(2)
    quality = read_quality(resolve_model(arguments.model), arguments.windows, console)
    speed: dict[str, list[Reading]] = {}
    if not arguments.quality_only:
        speed = read_speed(arguments.model, arguments.rounds, arguments.scale, console)
    gains = {name: gain(taken, speed["none"]) for name, taken in speed.items()}
    table = Table(
        "weights",
        "MiB",
        "perplexity",
        "divergence",
        "same token",
        "W1, ms a token",
        "W2, tokens/s",
        "W3, prompt tokens/s",
        "times",
        box=None,
    )
    for name, each in quality.items():
        row = [name, f"{each.weight_bytes / 2**20:.0f}", f"{each.perplexity:.3f}", f"{each.divergence:.5f}"]
        row.append(f"{each.same:.1%}")
        if name in speed:
            row.append(f"{1e3 * statistics.median(reading.token_s for reading in speed[name]):.1f}")
            row.append(f"{statistics.median(reading.tokens_per_s for reading in speed[name]):.0f}")
            row.append(f"{statistics.median(reading.prompt_tokens_per_s for reading in speed[name]):.0f}")
            row.append(", ".join(f"x {times:.2f}" for times in gains[name]))
        table.add_row(*row)
    Console().print(table)
    if arguments.json is not None:
        write_report(
            arguments.json,
            "quantised",
            model=arguments.model,
            quality={name: each._asdict() for name, each in quality.items()},
            gains={name: each._asdict() for name, each in gains.items()},
            rounds={name: [each._asdict() for each in taken] for name, taken in speed.items()},
        )


if __name__ == "__main__":
    main()
