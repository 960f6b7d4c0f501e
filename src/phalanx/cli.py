"""The command line: `phalanx COMMAND`. Commands live in `commands` of the rooms, one a module, and register here."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from phalanx import __version__
from phalanx.errors import PhalanxError
from phalanx.launcher.commands.bench import bench
from phalanx.launcher.commands.bench_comm import bench_comm
from phalanx.launcher.commands.bench_kernels import bench_kernels
from phalanx.launcher.commands.check import check
from phalanx.launcher.commands.deployments import launch, status, stop
from phalanx.launcher.commands.generate import generate
from phalanx.launcher.commands.profile import profile
from phalanx.launcher.commands.quantize import quantize
from phalanx.launcher.rank_main import OPENMP_SPINS
from phalanx.serve.commands.bench_serve import bench_serve
from phalanx.serve.commands.serve import serve

app = typer.Typer(
    name="phalanx",
    help="Tensor- and pipeline-parallel inference of large language models, in any layout.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(check)
app.command()(generate)
app.command()(serve)
app.command()(launch)
app.command()(status)
app.command()(stop)
bench.command("comm")(bench_comm)
bench.command("kernels")(bench_kernels)
bench.command("serve")(bench_serve)
app.add_typer(bench, name="bench")
app.command()(profile)
app.command()(quantize)


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


LOG_LEVELS = ("debug", "info", "warning", "error")


def _log_as_asked() -> None:
    """Logs to standard error from the level that the environment variable PHALANX_LOG names; warnings by default."""
    level = os.environ.get("PHALANX_LOG", "warning").lower()
    if level not in LOG_LEVELS:
        raise PhalanxError(f"PHALANX_LOG is {level!r}; allowed: {', '.join(LOG_LEVELS)}")
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")


def main() -> None:
    """Runs the command line. An error a user can cause is printed without a traceback and sets the exit code."""
    try:
        _log_as_asked()
        os.environ.setdefault(*OPENMP_SPINS)  # torch is not there yet
        app()
    except PhalanxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
