"""What hidden states in a byte a value between stages cost in exactness, and gain in time on a slow link.

    sudo python benchmarks/compress.py [--rate 100] [--tokens 1 32 512] [--rounds 9] [--json FILE]

Exactness: smollm2-135m in bfloat16 reads texts of this repository through 2 and 4 stages, their hand-overs compressed,
and is compared, position by position, with what it says uncompressed: the share of most likely tokens that are the
same, the mean error of a logit, and the Kullback-Leibler divergence; beside it what bfloat16 itself costs, by the same
measures from float32. Time: of the hand-over of its hidden states from
one host to another, taken in turns; the hosts are network namespaces of this machine, joined at the rate (Mbit/s).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from phalanx.comm import create_communicator
from phalanx.comm.compress import SCHEMES, Rows
from phalanx.kernels import plan_attention
from phalanx.launcher.bench.report import processor
from phalanx.models.batch import Batch, KVCache, Part
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.decoder import Decoder
from phalanx.models.params import rank_params
from phalanx.models.resolve import resolve_model
from phalanx.models.weights import load_params
from phalanx.parallel.handover import HandOver
from phalanx.parallel.layout import StageRequest, build_layout

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.host_ranks import PORT, add_rank_arguments, run_ranks  # noqa: E402
from tests.multinode.netlab import find_obstacle  # noqa: E402

MODEL = "smollm2-135m"
HIDDEN_SIZE = 576
DTYPE, CPU = torch.bfloat16, torch.device("cpu")
TEXTS = ("README.md", "CONTRIBUTING.md", "LICENSE", "comm/communicator.py", "engine/scheduler.py")
TEXT_TOKENS, PAGE_SIZE = 256, 16
STAGES = (2, 4)
WAYS = ("none", *SCHEMES)
HOSTS = ("alpha", "beta")


class Stages:
    """The model as so many stages in this process."""

    def __init__(self, num_stages: int, dtype: torch.dtype = DTYPE) -> None:
        source = resolve_model(MODEL)
        config = source.config
        layout = build_layout(config.shape, [StageRequest()] * num_stages)
        self._window = config.sliding_window
        self._parts: list[tuple[Decoder, KVCache]] = []
        num_pages = TEXT_TOKENS // PAGE_SIZE
        with Checkpoint(source.entries()) as checkpoint:
            for place, stage in zip(layout.places(), layout.stages, strict=True):
                weights = load_params(rank_params(config, layout, place), checkpoint, dtype, CPU)
                decoder = Decoder(config, stage, 0, create_communicator(rank=0, size=1), weights)
                shape = (stage.layers.size, num_pages, PAGE_SIZE, stage.kv_heads[0].size, config.shape.head_dim)
                self._parts.append((decoder, KVCache(*shape, dtype, CPU)))

    def logits(self, tokens: list[int], border: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """[tokens, vocabulary] in float32. border: what hidden states go through from stage to stage."""
        count = len(tokens)
        pages = torch.arange(count // PAGE_SIZE).unsqueeze(0)
        attention = plan_attention(pages, [count], [count], page_size=PAGE_SIZE, window=self._window, device=CPU)
        rows = torch.arange(count)
        batch = Batch((Part(rows, rows, attention),), rows)
        x = torch.tensor(tokens)
        for number, (decoder, cache) in enumerate(self._parts):
            x = decoder(border(x) if number else x, batch, cache)
        return decoder.logits(x, rows).float()


@torch.inference_mode()
def measure_exactness() -> list[dict[str, Any]]:
    source = resolve_model(MODEL)
    tokenizer = source.tokenizer()
    texts = [tokenizer.encode((ROOT / name).read_text())[:TEXT_TOKENS] for name in TEXTS]
    in_float32, in_bfloat16 = Stages(1, torch.float32), Stages(1)
    exact = [in_float32.logits(tokens, _as_it_is) for tokens in texts]
    plain = [in_bfloat16.logits(tokens, _as_it_is) for tokens in texts]
    found = [{"stages": 1, "scheme": "none", "hidden_state_error": 0.0, **_apart(exact, plain)}]
    for num_stages in STAGES:
        stages = Stages(num_stages)
        exact = [stages.logits(tokens, _as_it_is) for tokens in texts]
        for scheme in SCHEMES:
            off: list[float] = []
            got = [stages.logits(tokens, partial(_cross, scheme=scheme, off=off)) for tokens in texts]
            error = statistics.mean(off)
            found.append({"stages": num_stages, "scheme": scheme, "hidden_state_error": error, **_apart(exact, got)})
    return found


def _apart(exact: list[torch.Tensor], got: list[torch.Tensor]) -> dict[str, float]:
    """How far logits are from the exact ones, each [tokens, vocabulary] of a text."""
    right, found = torch.cat(exact), torch.cat(got)
    log_p, log_q = right.log_softmax(-1), found.log_softmax(-1)
    divergences = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "positions": len(right),
        "same_tokens": float((found.argmax(-1) == right.argmax(-1)).float().mean()),
        "mean_logit_error": float((found - right).abs().mean()),
        "logit_deviation": float(right.std()),
        "mean_kl_nats": float(divergences.mean()),
        "largest_kl_nats": float(divergences.max()),
    }


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _cross(x: torch.Tensor, *, scheme: str, off: list[float]) -> torch.Tensor:
    """As compressed hand-overs do; notes the error of a token in proportion to its length, in the mean."""
    got = Rows.of(x, scheme).decode(x.dtype)
    off.append(float(((got.double() - x.double()).norm(dim=-1) / x.double().norm(dim=-1)).mean()))
    return got


def rank_main(rank: int, address: str, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    with (
        create_communicator(rank=rank, size=2, rendezvous=f"tcp://{address}:{PORT}") as comm,
        create_communicator(rank=0, size=1) as alone,
        torch.inference_mode(),
    ):
        borders = {way: HandOver(comm, range(1), range(1, 2), alone, way) for way in WAYS}
        for num_tokens in tokens:
            x = torch.randn(num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).to(DTYPE)
            times_s: dict[str, list[float]] = {way: [] for way in WAYS}
            bytes_sent = {}
            for number in range(rounds + 2):  # the first two warm up
                for way, border in borders.items():
                    comm.barrier()
                    began_s = time.perf_counter()
                    if rank == 0:
                        border.send(x)
                        border.flush()
                    else:
                        border.expect(num_tokens, HIDDEN_SIZE, DTYPE, CPU)
                        border.receive()
                    if number > 1:
                        times_s[way].append(time.perf_counter() - began_s)
                    bytes_sent[way] = comm.ledger.entries()[-1].num_bytes
            found.append(
                {
                    "tokens": num_tokens,
                    "bytes": bytes_sent,
                    "ms": {way: 1e3 * statistics.median(taken) for way, taken in times_s.items()},
                    "faster": {
                        way: statistics.median(one / two for one, two in zip(times_s["none"], taken, strict=True))
                        for way, taken in times_s.items()
                    },
                }
            )
    return found


def measure_time(rate_mbit: float, tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """What the receiving rank saw."""
    found: list[dict[str, Any]] = run_ranks(__file__, HOSTS, rate_mbit, ["--rounds", rounds, "--tokens", *tokens])[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100.0, help="Mbit/s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_rank_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        print(json.dumps(rank_main(arguments.rank, arguments.address, arguments.tokens, arguments.rounds)))
        return
    if obstacle := find_obstacle():
        sys.exit(obstacle)
    exactness = measure_exactness()
    times = measure_time(arguments.rate, arguments.tokens, arguments.rounds)
    console = Console()
    table = Table(box=None)
    for name in ("stages", "scheme", "of hidden states", "same tokens", "of a logit", "KL, nats", "largest"):
        table.add_column(name, justify="right")
    for each in exactness:
        table.add_row(
            str(each["stages"]),
            each["scheme"],
            f"{each['hidden_state_error']:.2%}",
            f"{each['same_tokens']:.2%}",
            f"{each['mean_logit_error']:.3f}",
            f"{each['mean_kl_nats']:.5f}",
            f"{each['largest_kl_nats']:.3f}",
        )
    console.print(table)
    table = Table(box=None)
    for name in ("Mbit/s", "tokens", "scheme", "KB", "ms", "x"):
        table.add_column(name, justify="right")
    for each in times:
        for way in WAYS:
            figures = (f"{each['bytes'][way] / 1e3:.1f}", f"{each['ms'][way]:.2f}", f"{each['faster'][way]:.2f}")
            table.add_row(f"{arguments.rate:g}", str(each["tokens"]), way, *figures)
    console.print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "compress",
            "command": f"benchmarks/compress.py --rate {arguments.rate:g} --tokens "
            f"{' '.join(map(str, arguments.tokens))} --rounds {arguments.rounds}",
            "processor": processor(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "model": MODEL,
            "dtype": "bfloat16",
            "exactness": exactness,
            "rate_mbit": arguments.rate,
            "hand_over": times,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
