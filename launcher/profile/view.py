"""What a profile found, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from phalanx.launcher.profile.account import OPERATOR, TORCH, TRANSFER, WAIT, Phase
from phalanx.launcher.profile.report import ProfileReport

INTERPRETED = (
    "PyTorch's profiler looked on: steps that are otherwise replayed were called operator by operator, and the time of "
    "the steps that nobody looked at is that of the replay"
)


def profile_view(report: ProfileReport, top: int) -> Group:
    """Of each phase all ranks in a line, and the operators of the slowest. top: rows of a table."""
    parts: list[RenderableType] = []
    for place, each in report.ceilings.items():
        reads = "copies" if report.config["device"] == "cuda" else "reads"
        parts.append(
            f"{place}: {reads} {each.bytes_per_s / 1e9:.1f} GB/s, multiplies at {each.flops_per_s / 1e9:,.0f} GFLOP/s"
        )
    for name in report.names:
        parts.append("")
        ranks = report.ranks(name)
        if len(ranks) > 1:
            parts.append(_ranks(ranks))
        parts += _rows(report.slowest(name), top)
    if report.looks.torch or report.config["device"] == "cuda":
        parts.append(INTERPRETED)
    return Group(*parts)


def _title(phase: Phase) -> str:
    tokens = f"{phase.num_tokens} token{'s' if phase.num_tokens > 1 else ''}"
    return f"{phase.name}, {tokens} a step"


def _ranks(found: Sequence[Phase]) -> Table:
    table = Table("rank", "µs a step", "operators", "transfers", "waits", "the rest", box=None)
    table.title, table.title_justify = _title(found[0]), "left"
    for phase in found:
        beside = phase.sum_us(TORCH) + phase.rest_us
        figures = phase.step_us, phase.sum_us(OPERATOR), phase.sum_us(TRANSFER), phase.sum_us(WAIT), beside
        table.add_row(str(phase.place), *(f"{figure:,.0f}" for figure in figures))
    return table


def _rows(phase: Phase, top: int) -> Iterator[RenderableType]:
    table = Table("operator", "sizes", "calls", "µs", "of step", "MB", "MFLOP", "least µs", "of roofline", box=None)
    table.title, table.title_justify = f"{_title(phase)}: {phase.place}", "left"
    for row in phase.rows[:top]:
        share = row.roofline
        table.add_row(
            f"wait: {row.name}" if row.kind == WAIT else row.name,
            row.load,
            f"{row.calls:g}" if row.calls == int(row.calls) else f"{row.calls:.1f}",
            f"{row.taken_us:,.1f}",
            f"{row.taken_us / phase.step_us:.1%}",
            f"{row.num_bytes / 1e6:.2f}" if row.num_bytes else "",
            f"{row.num_flops / 1e6:,.1f}" if row.num_flops else "",
            f"{row.least_us:,.1f}" if row.least_us else "",
            "" if share is None else f"{share:.0%}",
        )
    others = phase.rows[top:]
    if others:
        left_us = sum(row.taken_us for row in others)
        table.add_row(f"{len(others)} more", "", "", f"{left_us:,.1f}", f"{left_us / phase.step_us:.1%}")
    rest = "interpreter, PyTorch, bindings" if not phase.sum_us(TORCH) else "interpreter, bindings"
    table.add_row(rest, "", "", f"{phase.rest_us:,.1f}", f"{phase.rest_us / phase.step_us:.1%}")
    least_us = sum(row.least_us for row in phase.rows)
    table.add_row(
        "step", "", "", f"{phase.step_us:,.1f}", "", "", "", f"{least_us:,.1f}", f"{least_us / phase.step_us:.0%}"
    )
    yield table
    told = f"means of the middle half of {phase.num_steps} steps"
    if phase.plain_us is not None:
        slower = phase.step_us / phase.plain_us - 1
        told += f"; {phase.plain_us:,.0f} µs where nobody looked, so looking cost {slower:+.1%}"
    yield told
