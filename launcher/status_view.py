"""How `phalanx status` shows deployments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def deployments_view(found: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """found: by name, what each deployment says of itself; see `Deployment.status`."""
    if not found:
        return Text("no deployments")
    parts: list[RenderableType] = [_overview(found)]
    running = {name: answer for name, answer in found.items() if answer.get("replicas")}
    if running:
        parts += [Text(), _activity(running)]
    parts += [Text(f"{name}: {answer['failure']}") for name, answer in found.items() if answer.get("failure")]
    return Group(*parts)


def _overview(found: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("deployment", "state", "model", "layout", "ranks on", "up", "requests", "output tokens", box=None)
    for name, answer in found.items():
        nodes: dict[str, int] = {}
        for rank in answer.get("ranks", ()):
            nodes[rank["node"]] = nodes.get(rank["node"], 0) + 1
        replicas = answer.get("replicas", ())
        table.add_row(
            name,
            answer["state"],
            answer.get("model", ""),
            answer.get("layout", ""),
            ", ".join(f"{node} ({count})" for node, count in nodes.items()),
            f"{answer.get('uptime_s', 0.0):.0f} s",
            str(sum(replica["finished"] for replica in replicas)) if replicas else "",
            str(sum(replica["output_tokens"] for replica in replicas)) if replicas else "",
        )
    return table


def _activity(running: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each replica does now."""
    columns = ("replica", "stages busy", "running", "waiting", "pages used", "prefix hits", "preempted", "tokens/s")
    table = Table("deployment", *columns, box=None)
    for name, answer in running.items():
        for number, replica in enumerate(answer["replicas"]):
            hits, prompts = replica["prompt_tokens_cached"], replica["prompt_tokens"]
            table.add_row(
                "" if number else name,
                str(number),
                " ".join(f"{share:.0%}" for share in replica["stage_busy"]),
                str(replica["running"]),
                str(replica["waiting"]),
                f"{replica['pages_used']} of {replica['pages']}, {replica['pages_kept']} kept",
                f"{hits / prompts:.0%} of {prompts} tokens" if prompts else "",
                str(replica["preemptions"]),
                f"{replica['tokens_per_s']:.1f}",
            )
    return table
