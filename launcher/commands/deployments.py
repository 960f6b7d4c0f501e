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
    watch: Annotated[
        float | None, typer.Option("--watch", min=0.1, metavar="SECONDS", help="Go on showing it, this often.")
    ] = None,
) -> None:
    """Show the deployments on a Ray cluster: layout and ranks; and now: how busy each stage is, requests running and
    waiting, pages used, prefix hits, tokens a second.
    """
    import json
    import time

    from rich.console import Console
    from rich.live import Live

    from phalanx.launcher import deployment
    from phalanx.launcher.ray_cluster import RayCluster
    from phalanx.launcher.status_view import deployments_view

    def look() -> dict[str, dict[str, Any]]:
        names = deployment.deployments() if name is None else [name]
        return {each: deployment.status(each) for each in names}

    cluster = RayCluster(address, num_ranks=0)
    try:
        found = look()
        if as_json:
            print(json.dumps(found, indent=2))
            return
        console = Console(highlight=False)
        if watch is None:
            console.print(deployments_view(found))
            return
        with Live(deployments_view(found), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(watch)
                live.update(deployments_view(look()), refresh=True)
    except KeyboardInterrupt:
        pass  # the way out of --watch
    finally:
        cluster.close()


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
