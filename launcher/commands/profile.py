"""`phalanx profile`: where the time of a configuration's steps goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phalanx.launcher.commands.bench import ConfigFile, JsonFile, Overrides, check_outputs, command_line, plotter

WIDTH = 120  # columns of the tables


def profile(
    context: typer.Context,
    config: ConfigFile,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Of each prompt, drawn at random.")
    ] = 128,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=2, help="Of each prompt; a step each.")] = 33,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts at once, on each replica.")] = 1,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Rounds of prompts that are looked at; as many are not.")
    ] = 3,
    top: Annotated[int, typer.Option("--top", min=1, help="Rows of a table, the longest first.")] = 16,
    with_torch: Annotated[
        bool,
        typer.Option(
            "--torch", help="PyTorch's profiler looks too; always on a GPU. Nothing recorded is replayed then."
        ),
    ] = False,
    nvtx: Annotated[
        bool,
        typer.Option(
            "--nvtx", help="Mark the steps for Nsight Systems or Nsight Compute, below which this runs, and no more."
        ),
    ] = False,
    json_file: JsonFile = None,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE.json",
            dir_okay=False,
            help="Write every step, transfer and operator of all ranks on one clock, for ui.perfetto.dev.",
        ),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", dir_okay=False, help="Draw the operators under the roofline."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Top operators of decode and prefill steps on every rank: calls, time, bytes and operations counted, and the share
    of the roofline that the ranks measure at their start. Replayed steps are timed as they are replayed.
    """
    import json

    from rich.console import Console

    from phalanx.engine.messages import ProfileSettings
    from phalanx.errors import PhalanxError
    from phalanx.launcher.config import load_config
    from phalanx.launcher.llm import LLM
    from phalanx.launcher.progress import StartProgress
    from phalanx.launcher.served import checked_plan
    from phalanx.models.resolve import resolve_model

    check_outputs(json_file, trace_file, plot_file)
    if nvtx and (json_file or trace_file or plot_file or with_torch):
        raise typer.BadParameter("--nvtx leaves all figures to Nsight: leave --json, --trace, --plot and --torch out")
    plot_roofline = None if plot_file is None else plotter("phalanx.launcher.bench_kernels.plot", "plot_roofline")
    settings = load_config(config, overrides or ())
    if nvtx:
        source = resolve_model(settings.model.path, revision=settings.model.revision)
        if checked_plan(settings, source).device != "cuda":
            raise PhalanxError(
                "--nvtx marks what GPUs do, and these ranks run on CPUs; leave it out for a profile of their "
                "operators, or run it where there is a GPU"
            )
    looks = ProfileSettings(torch=with_torch, nsight=nvtx)
    with StartProgress() as progress:
        llm = LLM.from_config(settings, on_progress=progress.update, profile=looks)
    with llm:
        progress.show_startup(llm.startup, llm.plan)
        # Not before the ranks have started: these bring torch.
        from phalanx.launcher.profile.report import ProfileReport
        from phalanx.launcher.profile.run import ProfileOptions, run_profile
        from phalanx.launcher.profile.view import profile_view
        from phalanx.launcher.trace_file import write_trace

        num_rounds = 1 if nvtx else rounds  # Nsight ends with the first
        whole = with_torch or llm.plan.device == "cuda"
        options = ProfileOptions(prompt_tokens, output_tokens, batch, num_rounds, whole_rounds=whole)
        with Console(stderr=True, highlight=False).status("") as status:
            runs = run_profile(llm, options, status.update)
        report = ProfileReport.of(llm, command_line(context), options, looks, runs)
    if nvtx:
        return
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # a row that is cut says nothing
    console.print(profile_view(report, top))
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if trace_file is not None:
        write_trace(runs.profiled, trace_file)
    if plot_roofline is not None and plot_file is not None:
        slowest = report.slowest("decode")
        title = f"{report.config['model']}, {report.config['dtype']}: decode steps of {slowest.place}"
        plot_roofline(title, report.ceilings[slowest.place], slowest.readings(), plot_file)
