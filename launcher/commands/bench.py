"""`phalanx bench`: how fast a configuration serves, and how busy it keeps its stages."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args, get_type_hints

import typer

if TYPE_CHECKING:
    from phalanx.launcher.bench.jobs import BenchOptions
    from phalanx.launcher.bench.workloads import WorkloadName

bench = typer.Typer(help="Measure how fast a configuration serves.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Rounds to measure, after one to warm up.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the prompts, their lengths and their arrivals.")]
Scale = Annotated[
    float,
    typer.Option(
        "--scale", min=0.001, help="Times all lengths in tokens: for a quick look, or a model of short sequences."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Write every reading as JSON.")
]
PlotFile = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE.png",
        dir_okay=False,
        help="Draw when each rank worked on which step and what it waited for, in the last round of each workload.",
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE.json",
        dir_okay=False,
        help="Write every step and transfer of all ranks, in the last round of each workload, for ui.perfetto.dev.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: parallel.tensor=3. Repeatable."),
]


@bench.command()
def latency(
    context: typer.Context,
    config: ConfigFile,
    rounds: Rounds = 5,
    seed: Seed = 0,
    scale: Scale = 1.0,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    trace_file: TraceFile = None,
    overrides: Overrides = None,
) -> None:
    """One request at a time (W1): a prompt of 64 tokens, 128 new. Time to the first token, and per token after it."""
    from phalanx.launcher.bench.jobs import BenchOptions

    _run(context, config, overrides, BenchOptions(("W1",), rounds, seed, scale), json_file, plot_file, trace_file)


@bench.command()
def throughput(
    context: typer.Context,
    config: ConfigFile,
    workloads: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            metavar="NAME",
            help="W2: 32 requests at once, prompts of 16 to 256 tokens, 64 new each. W3: 8 prompts of 1024 tokens, 1 "
            "new each. W4: requests that arrive at random. Repeatable; all three by default.",
        ),
    ] = None,
    rate: Annotated[float, typer.Option("--rate", help="W4: arrivals a second, on average.")] = 1.0,
    num_requests: Annotated[int, typer.Option("--num-requests", min=1, help="W4: requests in a round.")] = 64,
    ttft_limit_ms: Annotated[
        float, typer.Option("--ttft-limit-ms", min=0, help="W4: longest time to first token that counts as good.")
    ] = 2000.0,
    tpot_limit_ms: Annotated[
        float, typer.Option("--tpot-limit-ms", min=0, help="W4: longest mean time per token after it that does.")
    ] = 200.0,
    rounds: Rounds = 3,
    seed: Seed = 0,
    scale: Scale = 1.0,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
    trace_file: TraceFile = None,
    overrides: Overrides = None,
) -> None:
    """Many requests: tokens a second of W2 and W3; latencies of W4 as they spread, and its goodput: requests a second
    within both limits.
    """
    from phalanx.launcher.bench.jobs import BenchOptions
    from phalanx.launcher.bench.readings import LatencyLimits
    from phalanx.launcher.bench.workloads import OpenLoop

    options = BenchOptions(
        cast("tuple[WorkloadName, ...]", tuple(workloads or ("W2", "W3", "W4"))),
        rounds,
        seed,
        scale,
        OpenLoop(rate, num_requests),
        LatencyLimits(ttft_limit_ms / 1e3, tpot_limit_ms / 1e3),
    )
    _run(context, config, overrides, options, json_file, plot_file, trace_file)


def _run(
    context: typer.Context,
    config: Path,
    overrides: list[str] | None,
    options: BenchOptions,
    json_file: Path | None,
    plot_file: Path | None,
    trace_file: Path | None,
) -> None:
    import asyncio
    import json

    from rich.console import Console

    from phalanx.launcher.async_engine import AsyncEngine
    from phalanx.launcher.bench.jobs import plan_jobs, title
    from phalanx.launcher.bench.report import BenchReport, JobResult
    from phalanx.launcher.bench.report_view import report_view
    from phalanx.launcher.bench.rounds import measure
    from phalanx.launcher.config import load_config
    from phalanx.launcher.progress import StartProgress
    from phalanx.launcher.trace import TracedRun
    from phalanx.launcher.trace_file import write_trace

    check_outputs(json_file, plot_file, trace_file)
    plot_runs = None if plot_file is None else plotter("phalanx.launcher.trace_plot", "plot_runs")
    settings = load_config(config, overrides or ())
    jobs = plan_jobs(settings, options)
    with StartProgress() as progress:
        engine = AsyncEngine.from_config(settings, on_progress=progress.update, trace=bool(plot_file or trace_file))
    try:
        progress.show_startup(engine.startup, engine.plan)
        results = []
        with Console(stderr=True, highlight=False).status("") as status:
            for job in jobs:

                def show(number: int, name: str = job.name) -> None:
                    status.update(f"{name}: round {number} of {options.num_rounds}" if number else f"{name}: warm-up")

                taken = asyncio.run(measure(engine, job.requests, options.num_rounds, show))
                results.append(JobResult(job, tuple(taken)))
        report = BenchReport.of(engine, command_line(context), options, tuple(results))
    finally:
        engine.close()
    Console(highlight=False).print(report_view(report))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    runs = [(each, each.rounds[-1].trace) for each in results]
    traced = [(f"{each.job.name}: {title(each.job.name, options)}", run) for each, run in runs if run is not None]
    if trace_file is not None:
        write_trace(TracedRun.together([run for _, run in traced]), trace_file)
    if plot_runs is not None and plot_file is not None:
        plot_runs(", ".join(str(report.config[name]) for name in ("model", "dtype", "layout")), traced, plot_file)


def check_outputs(*paths: Path | None) -> None:
    """Raises for a file that could not be written: better before minutes of measuring than after."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.parent} for {path.name}; make it first")


def plotter(module: str, function: str) -> Callable[..., None]:
    """The function of `module`, which needs matplotlib. Raises PhalanxError where that is not installed."""
    from phalanx.errors import PhalanxError

    try:
        loaded: Callable[..., None] = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        raise PhalanxError(
            f"--plot needs matplotlib, and {error.name} is not installed; install it with `pip install "
            "'phalanx[plot]'`, or leave --plot out"
        ) from None
    return loaded


def command_line(context: typer.Context) -> str:
    """The command as it was given, files by their names alone: where they are is different elsewhere."""
    words = context.command_path.split()
    kinds = get_type_hints(context.command.callback)  # before Typer 0.29 a context holds paths as text
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        given = context.params[name]
        is_file = Path in (kinds[name], *get_args(kinds[name]))
        for value in given if isinstance(given, list | tuple) else [given]:
            option = [] if parameter.param_type_name == "argument" else [parameter.opts[-1]]
            words += [*option, Path(value).name if is_file else str(value)]
    return shlex.join(words)
