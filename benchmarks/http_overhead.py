"""What HTTP costs over the engine alone: throughput of many requests, and the time to the first token of one.

    python benchmarks/http_overhead.py [CONFIG] [--rounds 7] [--scale 1.0] [--json FILE]

One process holds the engine and its server. Rounds alternate: the engine's own callers, then a client in a process of
its own over HTTP, with the same requests (W2, streamed; then single requests of W1's prompts). The client takes the
same cores as the server and the ranks, and is part of what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from phalanx.launcher.async_engine import AsyncEngine
from phalanx.launcher.bench.report import processor
from phalanx.launcher.bench.rounds import play, turned
from phalanx.launcher.bench.workloads import RequestShape, workload
from phalanx.launcher.config import load_config
from phalanx.launcher.machine import this_machine
from phalanx.serve.app import HttpFront
from phalanx.serve.bench.client import HttpClient, RequestForm
from phalanx.serve.server import HttpServer, bind, url_of, with_bounds

NUM_SINGLE = 10  # requests one after another, for the time to the first token
SINGLE_TOKENS = 4


class Reading(NamedTuple):
    """Of one round. tokens_per_s: of many requests. first_token_s: median of single ones. client_cpu_s: of the many."""

    tokens_per_s: float
    first_token_s: float
    client_cpu_s: float


def shapes_of(number: int, scale: float, vocab_size: int) -> tuple[list[RequestShape], list[RequestShape]]:
    """Many requests, and single ones, with other prompts each round."""

    def scaled(shape: RequestShape, max_tokens: int) -> RequestShape:
        return shape._replace(prompt=shape.prompt[: max(1, round(len(shape.prompt) * scale))], max_tokens=max_tokens)

    many = [
        scaled(turned(shape, number), max(1, round(shape.max_tokens * scale)))
        for shape in workload("W2", vocab_size=vocab_size)
    ]
    [single] = workload("W1", vocab_size=vocab_size)
    return many, [scaled(turned(single, NUM_SINGLE * number + each), SINGLE_TOKENS) for each in range(NUM_SINGLE)]


async def direct(engine: AsyncEngine, many: Sequence[RequestShape], single: Sequence[RequestShape]) -> Reading:
    began_s = time.perf_counter()
    await play(engine, many)
    elapsed_s = time.perf_counter() - began_s
    first = [(await play(engine, [shape]))[0].token_s[0] for shape in single]
    return Reading(sum(shape.max_tokens for shape in many) / elapsed_s, statistics.median(first), 0.0)


async def over_http(url: str, many: Sequence[RequestShape], single: Sequence[RequestShape]) -> Reading:
    async with HttpClient(url) as client:
        form = RequestForm((await client.models())[0])

        async def first_token_s(shape: RequestShape) -> float:
            body = form.body(shape)
            began_s = time.perf_counter()
            answer = await client.complete(form.path, body)
            if answer.failure is not None:
                raise RuntimeError(f"a request failed: {answer.failure}")
            return answer.chunk_s[0] - began_s

        cpu_s, began_s = time.process_time(), time.perf_counter()
        await asyncio.gather(*(first_token_s(shape) for shape in many))
        elapsed_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        first = [await first_token_s(shape) for shape in single]
    return Reading(sum(shape.max_tokens for shape in many) / elapsed_s, statistics.median(first), cpu_s)


def client_main(connection: Connection, url: str) -> None:
    """The client's process: a round for each pair of workloads that comes."""
    while (shapes := connection.recv()) is not None:
        connection.send(asyncio.run(over_http(url, *shapes)))


async def measure(engine: AsyncEngine, rounds: int, scale: float, console: Console) -> list[tuple[Reading, Reading]]:
    loop = asyncio.get_running_loop()
    with bind("127.0.0.1", 0) as bound:
        front = HttpFront(engine)
        server = HttpServer(front)
        serving = asyncio.create_task(server.serve([bound]))
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        client = multiprocessing.get_context("spawn").Process(target=client_main, args=(theirs, url_of(bound)))
        client.start()
        readings = []
        for number in range(rounds + 1):  # the first warms up
            inside = await direct(engine, *shapes_of(2 * number, scale, engine.vocab_size))
            ours.send(shapes_of(2 * number + 1, scale, engine.vocab_size))
            outside = await loop.run_in_executor(None, ours.recv)
            readings.append((inside, outside))
            console.print(
                f"round {number}: {inside.tokens_per_s:.1f} and {outside.tokens_per_s:.1f} tokens/s, "
                f"{inside.first_token_s * 1e3:.1f} and {outside.first_token_s * 1e3:.1f} ms"
            )
        ours.send(None)
        client.join()
        server.hurry()
        await serving
        front.close()
    return readings[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/single.yaml"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="times all lengths of W2 and W1 in tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    config = with_bounds(load_config(arguments.config))
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"access_log": False})})
    with closing(AsyncEngine.from_config(config, ranks_apart=True)) as engine:
        readings = asyncio.run(measure(engine, arguments.rounds, arguments.scale, Console(stderr=True)))
        described = {"model": config.model.path, "layout": str(engine.plan.layout), "dtype": engine.plan.dtype}
    inside, outside = (list(each) for each in zip(*readings, strict=True))
    ratios = [http.tokens_per_s / engine_alone.tokens_per_s for engine_alone, http in readings]
    added_ms = [(http.first_token_s - engine_alone.first_token_s) * 1e3 for engine_alone, http in readings]
    table = Table("medians", "engine alone", "over HTTP", "difference", box=None)
    table.add_row(
        "tokens/s, W2",
        f"{statistics.median(each.tokens_per_s for each in inside):.1f}",
        f"{statistics.median(each.tokens_per_s for each in outside):.1f}",
        f"x {statistics.median(ratios):.3f}",
    )
    table.add_row(
        "ms to the first token, W1",
        f"{statistics.median(each.first_token_s for each in inside) * 1e3:.1f}",
        f"{statistics.median(each.first_token_s for each in outside) * 1e3:.1f}",
        f"{statistics.median(added_ms):+.1f}",
    )
    table.add_row("client's CPU seconds, W2", "", f"{statistics.median(each.client_cpu_s for each in outside):.2f}", "")
    Console().print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "http",
            "command": " ".join(["benchmarks/http_overhead.py", *sys.argv[1:]]),
            "processor": processor(),
            "cores": this_machine().num_cores,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **described,
            "throughput_ratio": statistics.median(ratios),
            "added_first_token_ms": statistics.median(added_ms),
            "engine_alone": [each._asdict() for each in inside],
            "over_http": [each._asdict() for each in outside],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
