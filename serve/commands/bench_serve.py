"""`phalanx bench serve`: how many requests a second a server takes, and how long they wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.launcher.commands.bench import JsonFile, Scale, Seed, check_outputs, command_line, plotter

if TYPE_CHECKING:
    from phalanx.serve.bench.client import HttpClient
    from phalanx.serve.bench.points import Point
    from phalanx.serve.bench.sweep import SweepPlan


def bench_serve(
    context: typer.Context,
    url: Annotated[str, typer.Argument(help="Of the server, with or without /v1.", metavar="URL")],
    model: Annotated[
        str | None, typer.Option("--model", help="Name of the model; the server's own by default.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="Its first line is sent as Bearer.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask for chats, whose prompts are words.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Prompts of words: for servers that take no token ids.")] = False,
    respect_eos: Annotated[
        bool,
        typer.Option("--respect-eos", help="Do not send ignore_eos; outputs may be shorter than drawn."),
    ] = False,
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=2, help="Token ids of prompts are below it.")] = 32_000,
    lengths: Annotated[
        Path | None,
        typer.Option(
            "--lengths",
            metavar="FILE",
            help='Draw lengths from it: JSON lines {"prompt_tokens": 100, "output_tokens": 20}, or CSV whose '
            "first line names these columns. The log-normal ones of W4 by default.",
        ),
    ] = None,
    rates: Annotated[
        list[float] | None,
        typer.Option(
            "--rate",
            metavar="R",
            help="Requests a second to measure at, on average. Repeatable; by default rates are doubled until the "
            "server falls behind, and the gap is halved.",
        ),
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option("--num-requests", min=1, help="Least at each rate; 64 where --duration is not given.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(
            "--duration",
            metavar="S",
            min=0.001,
            help="At each rate as many requests as arrive in so many seconds, where those are more; 20 "
            "seconds where --num-requests is not given.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.001, help="Of a request, until its last token.")
    ] = 600.0,
    ttft_limit_ms: Annotated[
        float, typer.Option("--ttft-limit-ms", min=0, help="Longest time to first token that counts as good.")
    ] = 2000.0,
    tpot_limit_ms: Annotated[
        float, typer.Option("--tpot-limit-ms", min=0, help="Longest mean time per token after it that does.")
    ] = 200.0,
    seed: Seed = 0,
    scale: Scale = 1.0,
    json_file: JsonFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", dir_okay=False, help="Draw throughput and latencies over the rate."),
    ] = None,
) -> None:
    """Send requests that arrive at random to an OpenAI-compatible server, at one rate after another, and find the rate
    at which they become too many.
    """
    import asyncio
    import json
    from functools import partial

    from rich.console import Console

    from phalanx.errors import PhalanxError
    from phalanx.launcher.bench.readings import LatencyLimits
    from phalanx.launcher.bench.workloads import OpenLoop
    from phalanx.serve.bench.client import HttpClient, RequestForm, api_root
    from phalanx.serve.bench.lengths import RequestSource, read_lengths
    from phalanx.serve.bench.report import ServeReport
    from phalanx.serve.bench.sweep import SweepPlan
    from phalanx.serve.bench.view import report_view

    check_outputs(json_file, plot_file)
    plot_report = None if plot_file is None else plotter("phalanx.serve.bench.plot", "plot_report")
    for rate in rates or ():
        OpenLoop(rate)  # refuses what is no rate
    api_key = None if api_key_file is None else _read_key(api_key_file)
    connect = partial(HttpClient, api_root(url), api_key=api_key, timeout_s=timeout)
    source = RequestSource(vocab_size, () if lengths is None else read_lengths(lengths), scale, seed)

    server = asyncio.run(_look(connect, model))
    if num_requests is None and duration is None:
        num_requests, duration = 64, 20.0
    plan = SweepPlan(
        RequestForm(server["model"], chat, text, not respect_eos),
        source,
        LatencyLimits(ttft_limit_ms / 1e3, tpot_limit_ms / 1e3),
        tuple(rates or ()),
        num_requests or 1,
        duration or 0.0,
    )
    points: list[Point] = []
    ended: BaseException | None = None
    try:
        asyncio.run(_measure(connect, plan, points))
    except (KeyboardInterrupt, PhalanxError) as error:
        if not points:
            raise
        ended = error  # once all that was measured is shown
    report = ServeReport(command_line(context), server, plan, None if lengths is None else lengths.name, points)
    Console(highlight=False).print(report_view(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if plot_report is not None and plot_file is not None:
        plot_report(report, plot_file)
    if ended is not None:
        raise ended


async def _look(connect: Callable[[], HttpClient], model: str | None) -> dict[str, str]:
    """What the server says of itself, with the name of the model to ask for."""
    from phalanx.errors import RequestError

    async with connect() as client:
        if model is None:
            models = await client.models()
            if len(models) != 1:
                raise RequestError(
                    f"{client.root} has {len(models)} models: {', '.join(models[:20])}; choose by --model"
                )
            (model,) = models
        return {"url": client.root, "model": model, **await client.describe()}


async def _measure(connect: Callable[[], HttpClient], plan: SweepPlan, points: list[Point]) -> None:
    """Fills the points, and shows how far it is."""
    from rich.console import Console

    from phalanx.serve.bench.sweep import Sweep
    from phalanx.serve.bench.view import point_line, progress_line

    console = Console(stderr=True, highlight=False)
    # Drawn twice a second and no more: the processor is the server's.
    with console.status("", refresh_per_second=2) as status:
        async with connect() as client:
            await Sweep(
                client,
                plan,
                on_progress=lambda progress: status.update(progress_line(progress)),
                on_point=lambda point: console.print(point_line(point, plan.limits)),
                points=points,
            ).run()


def _read_key(path: Path) -> str:
    from phalanx.errors import ConfigError, Problem

    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}")], str(path)) from None
    if not lines:
        raise ConfigError([Problem("", "has no key", allowed="a key on its first line")], str(path))
    return lines[0]
