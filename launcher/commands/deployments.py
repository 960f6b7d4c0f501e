"""`phalanx launch`, `status` and `stop`: named deployments on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ADDRESS = typer.Option("--address", metavar="HOST:PORT", help="The Ray cluster; else the one this machine belongs to.")


def launch(
    config: Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")],
    name: Annotated[str, typer.Option("--name", help="Name of the deployment.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: parallel.tensor=3. Repeatable."),
    ] = None,
) -> None:
    """Deploy CONFIG under a name on a running Ray cluster, and return when its ranks are ready."""
    import ray
    from rich.console import Console

    from phalanx.launcher import deployment

    console = Console(stderr=True, highlight=False)
    with console.status(f"starting deployment {name}"):
        actor = deployment.launch(config, name, overrides=overrides or ())
        status = ray.get(actor.status.remote())
    console.print(f"[bold]{name}[/] runs: {status['layout']}, ready in {status['startup_s']['total']:.1f} s")
    console.print(f'in Python: ray.init(namespace="{deployment.NAMESPACE}"); ray.get_actor("{name}")')


def status(
    name: Annotated[str | None, typer.Argument(help="Name of a deployment; else all of them.")] = None,
    address: Annotated[str, ADDRESS] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show the deployments on a Ray cluster: layout, ranks and their nodes, requests served."""
    import json

    from rich.console import Console
    from rich.table import Table

    from phalanx.launcher import deployment
    from phalanx.launcher.ray_cluster import RayCluster

    cluster = RayCluster(address, num_ranks=0)
    try:
        names = deployment.deployments() if name is None else [name]
        found = {each: deployment.status(each) for each in names}
    finally:
        cluster.close()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("deployment", "state", "model", "layout", "ranks on", "up", "requests", "output tokens", box=None)
    for each, answer in found.items():
        table.add_row(each, *_cells(answer))
    console = Console(highlight=False)
    console.print(table if found else "no deployments")
    for each, answer in found.items():
        if answer.get("failure"):
            console.print(f"{each}: {answer['failure']}", markup=False)


def stop(
    name: Annotated[str, typer.Argument(help="Name of the deployment.")],
    address: Annotated[str, ADDRESS] = "auto",
) -> None:
    """Stop a deployment and release everything it holds."""
    from phalanx.launcher import deployment
    from phalanx.launcher.ray_cluster import RayCluster

    cluster = RayCluster(address, num_ranks=0)
    try:
        deployment.stop(name)
    finally:
        cluster.close()
    typer.echo(f"stopped {name}", err=True)


def _cells(answer: dict[str, Any]) -> list[str]:
    nodes: dict[str, int] = {}
    for rank in answer.get("ranks", ()):
        nodes[rank["node"]] = nodes.get(rank["node"], 0) + 1
    return [
        answer["state"],
        answer.get("model", ""),
        answer.get("layout", ""),
        ", ".join(f"{node} ({count})" for node, count in nodes.items()),
        f"{answer.get('uptime_s', 0.0):.0f} s",
        str(answer.get("requests", "")),
        str(answer.get("output_tokens", "")),
    ]
