"""`phalanx quantize`: a plain checkpoint as a quantised one, kept."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from phalanx.launcher.commands.bench import ConfigFile, Overrides


class SchemeName(StrEnum):
    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"


def quantize(
    config: ConfigFile,
    directory: Annotated[
        Path, typer.Option("--to", metavar="DIR", file_okay=False, help="Where to; a new or an empty directory.")
    ],
    scheme: Annotated[
        SchemeName,
        typer.Option(
            "--scheme",
            help="Of the layers' matrices. int4: a scale and a zero for a group of inputs; int8, fp8: a scale an "
            "output.",
        ),
    ] = SchemeName.int4,
    group_size: Annotated[
        int | None, typer.Option("--group-size", min=1, help="Inputs that share a scale, of int4; 32 by default.")
    ] = None,
    awq: Annotated[
        bool | None,
        typer.Option(
            "--awq/--no-awq",
            help="Scale input channels by how large activations are in them (AWQ), or round to nearest. By default "
            "for int4.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text to measure activations on for AWQ. By default what the packages that Phalanx needs say of "
            "themselves.",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Quantise the model of a CONFIG into a directory that loads like any other, here and where compressed-tensors is
    read. Only the configuration's `model` counts.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from phalanx.launcher.config import load_config
    from phalanx.launcher.sizes import format_bytes
    from phalanx.models.calibration import read_text
    from phalanx.models.quantise_model import QuantiseOptions, quantise_model
    from phalanx.models.resolve import resolve_model

    model = load_config(config, overrides or ()).model
    options = QuantiseOptions(scheme.value, group_size, awq)
    if calibration is not None:
        if not options.scales_inputs:
            raise typer.BadParameter("--calibration is read by AWQ only: leave it out, or add --awq")
        options = options._replace(text=read_text(calibration))
    source = resolve_model(model.path, revision=model.revision)
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    way = "AWQ" if options.scales_inputs else "round to nearest"
    with Progress(*columns, console=console) as bars:
        title, num_layers = f"{source.name} to {scheme.value}, {way}: layers", source.config.shape.num_layers
        task = bars.add_task(title, total=num_layers, visible=False)  # until it is known that nothing stops it
        made = quantise_model(
            source, directory, options, lambda done, _: bars.update(task, completed=done, visible=True)
        )
    told = f"{directory}: {format_bytes(made.num_bytes)} in place of {format_bytes(made.plain_bytes)}"
    if made.found:
        told += (
            f"; what blocks err by is {made.error_share:.2f} times what it is without scales, on the calibration text"
        )
    print(told)
    print(f"run it with --set model.path={directory}")
