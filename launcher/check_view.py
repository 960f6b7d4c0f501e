"""A check's report for people: tables on a terminal, every line under 80 columns where the figures allow it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from phalanx.errors import Problem
from phalanx.launcher.check import CheckReport
from phalanx.launcher.kv_pool import KVPool
from phalanx.launcher.rank_plan import RankPlan
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
    head_head = ("rows of\nthe head",) if plan.layout.shares_head else ()
    split_heads = ("layers", "query\nheads", "KV\nheads", "FFN\ncolumns", "vocabulary\nrows", *head_head)
    table = _table("replica", "stage", "rank", *node_head, *split_heads, left=node_head)
    for replica in range(plan.layout.replicas):
        for rank in plan.ranks:
            stage = stages[rank.place.stage]
            part = rank.place.tensor_rank
            node = " ".join(filter(None, (stage.node, stage.accelerator))) or "any"
            vocab = stage.vocab[part] if stage.first or stage.last else "-"
            head = stage.head[part] if stage.head else "-"
            table.add_row(
                *map(str, (replica, stage.index, rank.place.rank)),
                *((node,) if has_node else ()),
                *map(str, (stage.layers, stage.query_heads[part], stage.kv_heads[part], stage.ffn[part], vocab)),
                *((str(head),) if head_head else ()),
            )
    return table


def memory_table(plan: RunPlan, device_memory: int | None) -> RenderableType:
    """What each rank holds in memory, and all of them together."""
    heads = ["rank", "parameters", "weights", "KV a token", "KV cache", "work", "total"]
    table = _table(*heads, *(["of device"] if device_memory else []))

    def figures(ranks: Sequence[RankPlan], copies: int = 1) -> list[str]:
        names = ("weight_bytes", "kv_bytes_per_token", "kv_bytes", "work_bytes", "total_bytes")
        sizes = [format_bytes(copies * sum(getattr(rank, name) for rank in ranks)) for name in names]
        if plan.kv_capacity_tokens is None:
            sizes[names.index("kv_bytes")] = "at start"
        return [format_count(copies * sum(rank.parameters for rank in ranks)), *sizes]

    for rank in plan.ranks:
        limit = device_memory * (plan.gpus_per_rank or 1) if device_memory else 0
        share = [f"{rank.total_bytes / limit:.0%}"] if limit else []
        table.add_row(str(rank.place.rank), *figures([rank]), *share)
    replicas = plan.layout.replicas
    label = "all" if replicas == 1 else f"all x{replicas}"
    table.add_row(label, *figures(plan.ranks, replicas), *([""] if device_memory else []))
    return table


def _capacity(plan: RunPlan) -> Text:
    pool, capacity = plan.kv_pool, plan.kv_capacity_tokens
    copies = " in each replica" if plan.layout.replicas > 1 else ""
    node = plan.layout.stages[plan.tightest.stage].node
    tightest = f"rank {plan.tightest.rank} in stage {plan.tightest.stage}" + (f" on {node}" if node else "")
    work = "Work is an estimate of what a step and its process need beside that."
    if capacity is None or pool.rooms is None:
        cost = format_bytes(plan.ranks[pool.tightest].kv_bytes_per_token)
        return Text(
            f"What the KV cache holds is measured at start; totals are without it.\n"
            f"On equal devices {tightest} is the tightest, at {cost} a token.\n{work}"
        )
    holds = "is measured at start; by an estimate it holds" if pool.measured else "holds"
    why = f"as many as fit {tightest}, the tightest"
    if capacity < min(pool.rooms) * pool.page_size:
        why = f"all that can be used; tightest is {tightest}"
    rooms = f"Tokens there is room for: {_rooms(pool)}.\n" if len(plan.ranks) > 1 else ""
    return Text(f"The KV cache {holds} {capacity} tokens{copies}, {why}.\n{rooms}{work}")


def _rooms(pool: KVPool) -> str:
    """Tokens that ranks have room for, neighbours alike in one: `26208 on ranks 0-1, 52416 on rank 2`."""
    words = []
    for room, group in groupby(enumerate(pool.rooms or ()), key=itemgetter(1)):
        ranks = [rank for rank, _ in group]
        which = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
        words.append(f"{room * pool.page_size} on {which}")
    return ", ".join(words)


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
