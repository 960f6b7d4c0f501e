"""What the tests of `configs/deploy` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from ray.scripts.scripts import cli as ray_cli

from phalanx.cli import app

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "configs" / "deploy"
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
LAST_WORDS_S = 15  # that a server takes after its requests are done, to send what was cut short and end its ranks


def parse_phalanx(arguments: list[str]) -> None:
    """Raises what the command line says of options that there are not."""
    commands: Any = typer.main.get_command(app)
    commands.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def parse_ray(arguments: list[str]) -> dict[str, Any]:
    """The options of a `ray` command, as Ray reads them."""
    options: dict[str, Any] = ray_cli.commands[arguments[0]].make_context(arguments[0], arguments[1:]).params
    return options
