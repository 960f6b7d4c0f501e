"""What hiding a stage's sums gains in a prefill: tensor parallelism of two over real links between two hosts.

    sudo python benchmarks/overlap.py [--shapes 135M 1B] [--rates 250 1000] [--tokens 256 1024 2048] [--rounds 5]
                                      [--json FILE]

The hosts are network namespaces of this machine, joined at each of the rates (Mbit/s); a rank on each, on a core of its
own, with one thread. They hold the layers of a model of random weights (a few, all alike) and run a prompt of each
length through them in turns: with its sums one after the other (`none`), by each of the ways of `parallel/overlap.py`,
and as `auto` decides by the rates measured there and seen since. Beside them the computing alone and the sums alone.
eta is what was hidden of what can be: (none - auto) / min(computing, sums).
"""

from __future__ import annotations

import argparse
import json
import os
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
from phalanx.comm.communicator import Communicator
from phalanx.comm.group import GroupSpec
from phalanx.engine.messages import Chunk, NewSequence, Sampling, StepPlan
from phalanx.engine.tables import SlotTables
from phalanx.kernels import choose_packing
from phalanx.kernels.packed import PackedWeight
from phalanx.models.batch import KVCache
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.decoder import Decoder
from phalanx.models.params import rank_params
from phalanx.native import resize_pool
from phalanx.parallel.layout import StageRequest, build_layout
from phalanx.parallel.overlap import Overlap
from phalanx.parallel.shape import ModelShape

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.host_ranks import PORT, add_rank_arguments, run_ranks  # noqa: E402
from benchmarks.multinode_share import SilentCommunicator  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from tests.multinode.netlab import find_obstacle  # noqa: E402

HOSTS = ("alpha", "beta")
SHAPES = {
    "135M": ModelShape(576, 10, 9, 3, 64, 1536, 1024),
    "1B": ModelShape(2048, 4, 32, 8, 64, 8192, 1024),
}
"""Of known models, with fewer layers and a small vocabulary: neither changes what a layer hides."""
WAYS = ("none", "chunks", "parts", "sequence", "auto")
PAGE_SIZE = 16
CPU = torch.device("cpu")


class Share:
    """A rank's part of the layers, of random weights."""

    def __init__(self, shape: ModelShape, rank: int, most_tokens: int) -> None:
        self._config = DecoderConfig("llama", shape, most_tokens, 1e-5, RopeConfig(), tie_embeddings=True)
        layout = build_layout(shape, [StageRequest(2)])
        self._rank = rank
        self._stage = layout.stages[0]
        generator = torch.Generator().manual_seed(rank)
        packed = choose_packing(torch.bfloat16, CPU).usable
        self._weights = {}
        for param in rank_params(self._config, layout, list(layout.places())[rank]):
            weight = torch.randn(param.shape, generator=generator).div_(param.shape[-1] ** 0.5).bfloat16()
            self._weights[param.name] = PackedWeight.pack(weight) if packed and param.multiplied else weight
        num_pages = -(-most_tokens // PAGE_SIZE)
        heads = self._stage.kv_heads[rank].size
        self._cache = KVCache(shape.num_layers, num_pages, PAGE_SIZE, heads, shape.head_dim, torch.bfloat16, CPU)
        self._tables = SlotTables(1, most_tokens, PAGE_SIZE, None, CPU)
        self._pages = tuple(range(num_pages))
        self._most_tokens = most_tokens

    def decoder(self, comm: Communicator, overlap: Overlap | None) -> Decoder:
        return Decoder(self._config, self._stage, self._rank, comm, self._weights, overlap)

    def measured(self, comm: Communicator) -> Overlap:
        overlap, decoder = Overlap(), self.decoder(comm, None)
        layer, work = decoder.layers[0], decoder.work()
        overlap.measure(comm, work, decoder.summed_weight, layer.ffn_norm, self._most_tokens)
        overlap.follow(comm)
        return overlap

    def prefill(self, decoder: Decoder, num_tokens: int) -> None:
        tokens = tuple(range(num_tokens))
        chunk = Chunk(0, 0, tuple(token % 1024 for token in tokens), sample=True)
        plan = StepPlan(step=0, new=(NewSequence(0, self._pages, Sampling()),), chunks=(chunk,))
        self._tables.apply(plan)
        decoder(self._tables.tokens(plan), self._tables.batch(plan, decoder.num_parts(num_tokens)), self._cache)


def sums(comm: Communicator, shape: ModelShape, num_tokens: int) -> None:
    x = torch.zeros(num_tokens, shape.hidden_size, dtype=torch.bfloat16)
    for _ in range(2 * shape.num_layers + 1):  # the embedding's, too
        comm.all_reduce(x)


def rank_main(
    rank: int, address: str, shape: ModelShape, backend: str, tokens: list[int], rounds: int
) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    resize_pool(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[rank % len(cores)]])
    share = Share(shape, rank, max(tokens))
    found = []
    rendezvous = f"tcp://{address}:{PORT}"
    with create_communicator(backend, rank=rank, size=2, rendezvous=rendezvous) as comm, torch.inference_mode():
        auto = share.measured(comm)
        decoders = {way: share.decoder(comm, auto if way == "auto" else Overlap(way)) for way in WAYS}
        alone = share.decoder(SilentCommunicator(GroupSpec(rank, 2)), None)
        for num_tokens in tokens:
            ways: dict[str, Callable[[], object]] = {
                **{way: partial(share.prefill, decoder, num_tokens) for way, decoder in decoders.items()},
                "computing": partial(share.prefill, alone, num_tokens),
                "sums": partial(sums, comm, shape, num_tokens),
            }
            times_s: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(rounds + 1):  # the first warms up
                for name, work in ways.items():
                    comm.barrier()
                    began_s = time.perf_counter()
                    work()
                    comm.barrier()
                    if number:
                        times_s[name].append(time.perf_counter() - began_s)
            medians = {name: statistics.median(taken) for name, taken in times_s.items()}
            ratios = {
                way: statistics.median(one / other for one, other in zip(times_s["none"], times_s[way], strict=True))
                for way in WAYS[1:]
            }
            hidden = (medians["none"] - medians["auto"]) / min(medians["computing"], medians["sums"])
            found.append(
                {
                    "tokens": num_tokens,
                    "chosen": auto.way(num_tokens).name,
                    "told": auto.told(num_tokens),
                    "medians_ms": {name: 1e3 * taken for name, taken in medians.items()},
                    "faster": ratios,
                    "eta": hidden,
                }
            )
    return found


def measure(shape: str, rate_mbit: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """On two hosts at this rate; what the first rank saw."""
    given = ["--shapes", shape, "--backend", arguments.backend, "--rounds", arguments.rounds]
    found: list[dict[str, Any]] = run_ranks(__file__, HOSTS, rate_mbit, [*given, "--tokens", *arguments.tokens])[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rates", type=float, nargs="+", default=[250.0, 1000.0], help="Mbit/s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--backend", default="auto", help="communicator between the hosts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_rank_arguments(parser)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        shape = SHAPES[arguments.shapes[0]]
        given = arguments.backend, arguments.tokens, arguments.rounds
        print(json.dumps(rank_main(arguments.rank, arguments.address, shape, *given)))
        return
    if obstacle := find_obstacle():
        sys.exit(obstacle)
    table = Table(box=None)
    columns = ("shape", "Mbit/s", "tokens", "computing, ms", "sums, ms", *(f"{way}, ms" for way in WAYS))
    for name in (*columns, "auto took", "x", "eta"):
        table.add_column(name, justify="right")
    runs = []
    for shape in arguments.shapes:
        for rate in arguments.rates:
            found = measure(shape, rate, arguments)
            runs.append({"shape": shape, "rate_mbit": rate, "prefills": found})
            for each in found:
                figures = [f"{each['medians_ms'][name]:.0f}" for name in ("computing", "sums", *WAYS)]
                gained = f"{each['faster']['auto']:.2f}", f"{each['eta']:.2f}"
                table.add_row(shape, f"{rate:g}", str(each["tokens"]), *figures, each["chosen"], *gained)
    Console(width=160).print(table)
    if arguments.json is not None:
        write_report(
            arguments.json,
            "overlap",
            shapes={name: str(SHAPES[name]) for name in arguments.shapes},
            runs=runs,
        )


if __name__ == "__main__":
    main()
