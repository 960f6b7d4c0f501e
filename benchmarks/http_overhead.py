"""What HTTP costs over the engine alone: throughput of many requests, and the time to the first token of one.

    python benchmarks/http_overhead.py [CONFIG] [--rounds 15] [--scale 1.0] [--json FILE]

One process holds the engine and its server. The same work goes to the engine's own callers and, from a client in a
process of its own, over HTTP, in turns: W2 as a whole, streamed, then single requests with the prompt of W1, one here
and one there. The client takes the same cores as the server and the ranks, and is part of what is measured. Where other
programs disturb the machine, what the processes took of its cores says more than the speeds do.
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
import uvloop
from rich.console import Console
from rich.table import Table

from phalanx.launcher.async_engine import AsyncEngine
from phalanx.launcher.bench.jobs import scaled
from phalanx.launcher.bench.report import processor
from phalanx.launcher.bench.rounds import play, turned
from phalanx.launcher.bench.workloads import RequestShape, workload
from phalanx.launcher.config import load_config
from phalanx.launcher.machine import this_machine
from phalanx.serve.app import HttpFront
from phalanx.serve.bench.client import HttpClient, RequestForm
from phalanx.serve.server import HttpServer, bind, url_of, with_bounds

NUM_SINGLE = 10  # pairs of single requests in a round
SINGLE_TOKENS = 4


class Answered(NamedTuple):
    """What came of requests that were sent at once. first_token_s: of each. cpu_s: that the caller's process took."""

    elapsed_s: float
    first_token_s: list[float]
    cpu_s: float


class Round(NamedTuple):
    """tokens_per_s: of W2, by the engine alone and over HTTP. first_token_s: of single requests, in pairs. cpu_s: that
    W2 took of the cores, in the process of engine and server alone and with HTTP, and in the client's; not in ranks'.
    """

    tokens_per_s: tuple[float, float]
    first_token_s: list[tuple[float, float]]
    cpu_s: tuple[float, float, float]


def many_of(number: int, scale: float, vocab_size: int) -> list[RequestShape]:
    """W2, with other prompts for each number."""
    return [scaled(turned(shape, number), scale) for shape in workload("W2", vocab_size=vocab_size)]


def single_of(number: int, scale: float, vocab_size: int) -> list[RequestShape]:
    """One request, with another prompt for each number."""
    [shape] = workload("W1", vocab_size=vocab_size)
    return [scaled(turned(shape, number), scale)._replace(max_tokens=SINGLE_TOKENS)]


async def direct(engine: AsyncEngine, shapes: Sequence[RequestShape]) -> Answered:
    cpu_s, began_s = time.process_time(), time.perf_counter()
    played = await play(engine, shapes)
    elapsed_s = time.perf_counter() - began_s
    return Answered(elapsed_s, [each.token_s[0] for each in played], time.process_time() - cpu_s)


async def over_http(client: HttpClient, form: RequestForm, shapes: Sequence[RequestShape]) -> Answered:
    async def first_token_s(shape: RequestShape) -> float:
        body = form.body(shape)
        began_s = time.perf_counter()
        answer = await client.complete(form.path, body)
        if answer.failure is not None:
            raise RuntimeError(f"a request failed: {answer.failure}")
        return answer.chunk_s[0] - began_s

    cpu_s, began_s = time.process_time(), time.perf_counter()
    first = await asyncio.gather(*(first_token_s(shape) for shape in shapes))
    return Answered(time.perf_counter() - began_s, first, time.process_time() - cpu_s)


def client_main(connection: Connection, url: str) -> None:
    """The client's process: sends each list of requests that comes."""

    async def serve() -> None:
        async with HttpClient(url) as client:
            form = RequestForm((await client.models())[0])
            while (shapes := connection.recv()) is not None:
                connection.send(await over_http(client, form, shapes))

    uvloop.run(serve())  # as light as a client in Python can be


async def measure(engine: AsyncEngine, rounds: int, scale: float, console: Console) -> list[Round]:
    loop = asyncio.get_running_loop()
    with bind("127.0.0.1", 0) as bound:
        front = HttpFront(engine)
        server = HttpServer(front)
        serving = asyncio.create_task(server.serve([bound]))
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        client = multiprocessing.get_context("spawn").Process(target=client_main, args=(theirs, url_of(bound)))
        client.start()

        async def remote(shapes: Sequence[RequestShape]) -> tuple[Answered, float]:
            cpu_s = time.process_time()
            ours.send(shapes)
            answered: Answered = await loop.run_in_executor(None, ours.recv)
            return answered, time.process_time() - cpu_s

        vocab_size, found = engine.vocab_size, []
        for number in range(rounds + 1):  # the first warms up
            many = [many_of(2 * number + side, scale, vocab_size) for side in (0, 1)]
            num_tokens = sum(shape.max_tokens for shape in many[0])
            if number % 2:
                inside, (outside, server_cpu_s) = await direct(engine, many[0]), await remote(many[1])
            else:
                (outside, server_cpu_s), inside = await remote(many[0]), await direct(engine, many[1])
            pairs = []
            for place in range(2 * NUM_SINGLE * number, 2 * NUM_SINGLE * (number + 1), 2):
                shapes = [single_of(place + side, scale, vocab_size) for side in (0, 1)]
                if place % 4:
                    alone, (served, _) = await direct(engine, shapes[0]), await remote(shapes[1])
                else:
                    (served, _), alone = await remote(shapes[0]), await direct(engine, shapes[1])
                pairs.append((alone.first_token_s[0], served.first_token_s[0]))
            speeds = num_tokens / inside.elapsed_s, num_tokens / outside.elapsed_s
            found.append(Round(speeds, pairs, (inside.cpu_s, server_cpu_s, outside.cpu_s)))
            alone_ms, served_ms = (1e3 * statistics.median(each) for each in zip(*pairs, strict=True))
            console.print(
                f"round {number}: {speeds[0]:.1f} and {speeds[1]:.1f} tokens/s, {alone_ms:.1f} and {served_ms:.1f} ms"
            )
        ours.send(None)
        client.join()
        server.hurry()
        await serving
        front.close()
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=Path("configs/single.yaml"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="times all lengths of W2 and W1 in tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    config = with_bounds(load_config(arguments.config))
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"access_log": False})})
    with closing(AsyncEngine.from_config(config, ranks_apart=True)) as engine:
        found = uvloop.run(measure(engine, arguments.rounds, arguments.scale, Console(stderr=True)))
        described = {"model": config.model.path, "layout": str(engine.plan.layout), "dtype": engine.plan.dtype}
    speeds = [statistics.median(each.tokens_per_s[side] for each in found) for side in (0, 1)]
    ratio = statistics.median(each.tokens_per_s[1] / each.tokens_per_s[0] for each in found)
    pairs = [pair for each in found for pair in each.first_token_s]
    first_ms = [1e3 * statistics.median(pair[side] for pair in pairs) for side in (0, 1)]
    added_ms = 1e3 * statistics.median(served - alone for alone, served in pairs)
    cpu_s = [statistics.median(each.cpu_s[part] for each in found) for part in range(3)]
    table = Table("medians", "engine alone", "over HTTP", "difference", box=None)
    table.add_row("tokens/s, W2", f"{speeds[0]:.1f}", f"{speeds[1]:.1f}", f"x {ratio:.3f}")
    table.add_row("ms to the first token, W1", f"{first_ms[0]:.1f}", f"{first_ms[1]:.1f}", f"{added_ms:+.1f}")
    spent = f"{cpu_s[1]:.3f} + {cpu_s[2]:.3f} by the client"
    table.add_row(
        "CPU seconds beside the ranks, W2", f"{cpu_s[0]:.3f}", spent, f"{cpu_s[1] + cpu_s[2] - cpu_s[0]:+.3f}"
    )
    Console().print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "http",
            "command": " ".join(["benchmarks/http_overhead.py", *sys.argv[1:]]),
            "processor": processor(),
            "cores": this_machine().num_cores,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **described,
            "throughput_ratio": ratio,
            "added_first_token_ms": added_ms,
            "tokens_per_s": {"engine_alone": speeds[0], "over_http": speeds[1]},
            "first_token_ms": {"engine_alone": first_ms[0], "over_http": first_ms[1]},
            "cpu_s": {"engine_alone": cpu_s[0], "over_http": cpu_s[1], "client": cpu_s[2]},
            "rounds": [each._asdict() for each in found],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
