"""`phalanx check`: what a configuration means, or what is wrong with it. Starts nothing, needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    config: Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: parallel.tensor=3. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show the layout and every decision a CONFIG leads to, or everything that is wrong with it. Starts nothing.

    Exit codes: 0 good, 2 bad configuration, 3 cannot run here.
    """
    import json

    from rich.console import Console

    from phalanx.launcher.check import check as run_check
    from phalanx.launcher.check_view import show_report

    report = run_check(config, overrides or ())
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        show_report(report, Console(highlight=False))
    raise typer.Exit(report.exit_code)
