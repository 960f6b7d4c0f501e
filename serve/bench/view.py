"""How `phalanx bench serve` shows what goes on and what it found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phalanx.launcher.bench.readings import LatencyLimits
from phalanx.serve.bench.points import KNEE, Point, client_is_late, falls_behind, notes, read_figures
from phalanx.serve.bench.report import ServeReport
from phalanx.serve.bench.sweep import Progress

RATES_ABREAST = 8  # in a table, which so fits a terminal of 80 columns


class _Row(NamedTuple):
    """scale: from the figure's unit to the one shown."""

    title: str
    figure: str
    scale: float
    digits: int


_ROWS = (
    _Row("arrived, requests/s", "arrived_per_s", 1, 2),
    _Row("completed, requests/s", "completed_per_s", 1, 2),
    _Row("goodput, requests/s", "goodput_per_s", 1, 2),
    _Row("output tokens/s", "output_tokens_per_s", 1, 1),
    _Row("TTFT p50, ms", "time_to_first_token_p50_s", 1e3, 0),
    _Row("TTFT p99, ms", "time_to_first_token_p99_s", 1e3, 0),
    _Row("TPOT p50, ms", "time_per_output_token_p50_s", 1e3, 1),
    _Row("TPOT p99, ms", "time_per_output_token_p99_s", 1e3, 1),
    _Row("ITL p99, ms", "time_between_tokens_p99_s", 1e3, 1),
    _Row("end to end p50, s", "end_to_end_p50_s", 1, 2),
    _Row("end to end p99, s", "end_to_end_p99_s", 1, 2),
)


def progress_line(progress: Progress) -> str:
    """How far it is with one rate."""
    done = len(progress.readings)
    failed = sum(reading.failure is not None for reading in progress.readings)
    name = "warm-up" if progress.rate_per_s is None else f"{progress.rate_per_s:g} requests/s"
    words = f"{name}: {progress.num_sent} of {progress.num_planned} sent, {done - failed} finished, "
    words += f"{progress.num_sent - done} running, {progress.num_chunks / max(progress.elapsed_s, 1e-3):.0f} tokens/s"
    return words + (f", {failed} failed" if failed else "")


def point_line(point: Point, limits: LatencyLimits) -> str:
    """A point as soon as it is measured."""
    figures = read_figures(point, limits)
    words = f"{point.rate_per_s:g} requests/s: "
    if figures.completed_per_s is not None:
        words += f"{figures.completed_per_s:.3g} completed, {figures.output_tokens_per_s:.0f} tokens/s, "
    words += f"{figures.share_within_limits:.0%} within the limits"
    return words + (f", {_failures(point)} failed" if point.failures else "")


def report_view(report: ServeReport) -> RenderableType:
    """Of at least one point."""
    server, scale = report.server, report.plan.source.scale
    lengths = f"lengths of {report.lengths or 'W4'}" + (f" times {scale:g}" if scale != 1 else "")
    parts: list[RenderableType] = [
        Text.assemble((f"{server['model']} at {server['url']}", "bold"), f"; {lengths}, arrivals at random (Poisson)")
    ]
    points = sorted(report.points, key=lambda point: point.rate_per_s)
    for first in range(0, len(points), RATES_ABREAST):
        parts += [Text(), _table(points[first : first + RATES_ABREAST], report)]
    return Group(*parts, Text(), *(Text(line) for line in _remarks(points, report)))


def _table(points: Sequence[Point], report: ServeReport) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("rate, requests/s")
    for point in points:
        style = "bold" if point is report.knee else None
        table.add_column(f"{point.rate_per_s:g}", justify="right", style=style)
    found = [read_figures(point, report.plan.limits) for point in points]
    for row in _ROWS:
        values: list[float | None] = [getattr(figures, row.figure) for figures in found]
        cells = ("-" if value is None else f"{value * row.scale:.{row.digits}f}" for value in values)
        table.add_row(row.title, *cells)
    table.add_row("failed", *(str(len(point.readings) - len(point.served)) for point in points))
    return table


def _failures(point: Point) -> str:
    return ", ".join(f"{len(failures)} x {kind}" for kind, failures in point.failures.items())


def _remarks(points: Sequence[Point], report: ServeReport) -> Iterator[str]:
    limits = report.plan.limits
    yield _knee_line(points, report)
    yield f"the knee is {KNEE}"
    yield (
        f"limits: {limits.time_to_first_token_s * 1e3:g} ms to the first token (TTFT), "
        f"{limits.time_per_output_token_s * 1e3:g} ms for each after it (TPOT, mean of a request); all latencies are "
        "from when a request was due"
    )
    for point in points:
        name = f"at {point.rate_per_s:g}: "
        for kind, failures in point.failures.items():
            yield f"{name}{len(failures)} x {kind}, such as: {failures[0].message}"
        yield from (name + note for note in notes(point))
    if any(client_is_late(point) for point in points):
        yield "where the client is late or busy, its delays are in these figures: give it cores or a machine of its own"


def _knee_line(points: Sequence[Point], report: ServeReport) -> str:
    limits, knee = report.plan.limits, report.knee
    whole = [point for point in points if not point.interrupted]
    if not whole:
        return "knee: unknown, no rate was measured to the end"
    behind = next((point for point in whole if falls_behind(point, limits)), None)
    if behind is None:
        return f"knee: not reached, the server kept up with {whole[-1].rate_per_s:g} requests/s"
    found = f"{knee.rate_per_s:g} requests/s" if knee else "below all rates measured"
    words = f"knee: {found}; at {behind.rate_per_s:g}, {falls_behind(behind, limits)}"
    return words + (", but the client may be what is slow" if client_is_late(behind) else "")
