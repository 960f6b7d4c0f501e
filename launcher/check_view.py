"""A check's report for people: tables on a terminal, every line under 80 columns where the figures allow it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from phalanx.errors import Problem
from phalanx.launcher.check import CheckReport
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.sizes import format_bytes, format_count


def show_report(report: CheckReport, out: Console) -> None:
    """Prints the layout, the decisions, the notes and everything that is wrong."""
    if report.plan is not None:
        out.print(Text(f"{report.model}: {format_count(report.model_parameters)} parameters on {report.plan.layout}"))
        out.print(layout_table(report.plan))
        out.print()
        out.print(memory_table(report.plan, report.device_memory))
        out.print(_capacity(report.plan))
        out.print()
        out.print(_decision_table(report))
    for note in report.notes:
        out.print(Text(f"note: {note}", style="dim"))
    if report.errors:
        show_problems(report.errors, report.source, out)
    else:
        out.print(Text(f"{report.source}: good", style="bold green"), soft_wrap=True)


def show_problems(problems: Sequence[Problem], source: str, out: Console) -> None:
    """Prints problems one below the other, each with what was found and what to do."""
    count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
    out.print(Text(f"{source}: {count}", style="bold red"), soft_wrap=True)
    for problem in problems:
        out.print(Text(f"  {problem}"), soft_wrap=True)


def layout_table(plan: RunPlan) -> RenderableType:
    """Which rank holds what. `first-last`, both included; a KV head that two ranks show is held by both."""
    stages = plan.layout.stages
    has_node = any(stage.node or stage.accelerator for stage in stages)
    node_head = ("node",) if has_node else ()
    split_heads = ("layers", "query\nheads", "KV\nheads", "FFN\ncolumns", "vocabulary\nrows")
    table = _table("replica", "stage", "rank", *node_head, *split_heads, left=node_head)
    for replica in range(plan.layout.replicas):
        for rank in plan.ranks:
            stage = stages[rank.place.stage]
            part = rank.place.tensor_rank
            node = " ".join(filter(None, (stage.node, stage.accelerator))) or "any"
            vocab = stage.vocab[part] if stage.first or stage.last else "-"
            table.add_row(
                *map(str, (replica, stage.index, rank.place.rank)),
                *((node,) if has_node else ()),
                *map(str, (stage.layers, stage.query_heads[part], stage.kv_heads[part], stage.ffn[part], vocab)),
            )
    return table


def memory_table(plan: RunPlan, device_memory: int | None) -> RenderableType:
    """What each rank holds in memory, and all of them together."""
    heads = ["rank", "parameters", "weights", "KV a token", "KV cache", "work", "total"]
    table = _table(*heads, *(["of device"] if device_memory else []))
    for rank in plan.ranks:
        sizes = (rank.weight_bytes, rank.kv_bytes_per_token, rank.kv_bytes, rank.work_bytes, rank.total_bytes)
        limit = device_memory * (plan.gpus_per_rank or 1) if device_memory else 0
        share = [f"{rank.total_bytes / limit:.0%}"] if limit else []
        table.add_row(str(rank.place.rank), format_count(rank.parameters), *map(format_bytes, sizes), *share)
    replicas = plan.layout.replicas
    sums = [
        replicas * sum(getattr(rank, name) for rank in plan.ranks)
        for name in ("weight_bytes", "kv_bytes_per_token", "kv_bytes", "work_bytes", "total_bytes")
    ]
    label = "all" if replicas == 1 else f"all x{replicas}"
    parameters = replicas * sum(rank.parameters for rank in plan.ranks)
    table.add_row(label, format_count(parameters), *map(format_bytes, sums), *([""] if device_memory else []))
    return table


def _capacity(plan: RunPlan) -> Text:
    copies = " in each replica" if plan.layout.replicas > 1 else ""
    tightest = f"as many as fit rank {plan.tightest.rank}, the tightest"
    return Text(
        f"The KV cache holds {plan.kv_capacity_tokens} tokens{copies}, {tightest}.\n"
        "Work is an estimate of what a step and its process need beside that."
    )


def _decision_table(report: CheckReport) -> RenderableType:
    table = _table("decided", "choice", "because", left=("decided", "choice", "because"))
    for decision in report.decisions:
        table.add_row(*map(Text, decision))
    return table


def _table(*heads: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        if head in left:
            table.add_column(head, overflow="fold")
        else:
            table.add_column(head, justify="right", no_wrap=True)
    return table
