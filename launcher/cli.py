"""The command line: `phalanx COMMAND`. Commands live in `launcher/commands`, one a module, registered here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from phalanx import __version__
from phalanx.errors import PhalanxError
from phalanx.launcher.commands.check import check
from phalanx.launcher.commands.deployments import launch, status, stop
from phalanx.launcher.commands.generate import generate

app = typer.Typer(
    name="phalanx",
    help="Tensor- and pipeline-parallel inference of large language models, in any layout.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(check)
app.command()(generate)
app.command()(launch)
app.command()(status)
app.command()(stop)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    print(f"phalanx {__version__}")
    raise typer.Exit


@app.callback()
def phalanx(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Tensor- and pipeline-parallel inference of large language models, in any layout."""


def main() -> None:
    """Runs the command line. An error a user can cause is printed without a traceback and sets the exit code."""
    try:
        app()
    except PhalanxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
