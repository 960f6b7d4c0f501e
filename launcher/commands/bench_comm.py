"""`phalanx bench comm`: what transfers take between the ranks of a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phalanx.launcher.commands.bench import ConfigFile, JsonFile, Overrides, check_outputs, command_line, plotter


def bench_comm(
    context: typer.Context,
    config: ConfigFile,
    ops: Annotated[
        str,
        typer.Option("--ops", metavar="OP,..", help="What to measure."),
    ] = "all_reduce,all_gather,reduce_scatter,broadcast,barrier,send_recv",
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="SIZE,..", help="Of the longer tensor of an operation, such as 8KiB.")
    ] = "1KiB,8KiB,64KiB,512KiB,4MiB,32MiB",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Readings of each, after one to warm up.")] = 7,
    json_file: JsonFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", dir_okay=False, help="Draw time over size, beside the limit."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Latency and bandwidth of each kind of transfer, for every tensor group and pipeline border of a layout, on every
    backend that can serve it, beside the physical limit. Ranks are started as in a run, but load nothing.
    """
    import json

    from rich.console import Console

    from phalanx.launcher.bench_comm.measure import CommOptions, Measurement
    from phalanx.launcher.bench_comm.plan import parse_ops, parse_sizes, plan_comm
    from phalanx.launcher.bench_comm.ranks import Ranks
    from phalanx.launcher.bench_comm.report import CommReport
    from phalanx.launcher.bench_comm.view import Show, title_view
    from phalanx.launcher.config import load_config
    from phalanx.launcher.rank_plan import DTYPE_BYTES

    check_outputs(json_file, plot_file)
    plot_groups = None if plot_file is None else plotter("phalanx.launcher.bench_comm.plot", "plot_groups")
    options = CommOptions(parse_ops(ops), parse_sizes(sizes), rounds)
    settings = load_config(config, overrides or ())
    plan = plan_comm(settings, options.ops)
    console = Console(highlight=False)
    console.print(title_view(plan.run, plan.hidden_size, rounds))
    # Drawn twice a second and no more: the cores are the ranks'.
    with (
        Console(stderr=True, highlight=False).status("starting ranks", refresh_per_second=2) as status,
        Ranks.start(plan.specs, plan.settings) as ranks,
    ):
        measurement = Measurement(
            ranks,
            options,
            backend=plan.run.backend,
            device=plan.run.device,
            itemsize=DTYPE_BYTES[plan.run.dtype],
            listener=Show(console, status),
        )
        groups = [measurement.measure(group) for group in plan.groups]
        report = CommReport(command_line(context), settings, plan.run, options, ranks.nodes(), groups)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if plot_groups is not None and plot_file is not None:
        plot_groups(f"{plan.run.layout}, {plan.run.dtype} on {plan.run.device}", groups, plot_file)
