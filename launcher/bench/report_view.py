"""How `phalanx bench` shows what it found."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phalanx.launcher.bench.figures import FIGURES, FIGURES_OF, Spread
from phalanx.launcher.bench.jobs import title
from phalanx.launcher.bench.memory import PeakMemory
from phalanx.launcher.bench.report import BenchReport, JobResult
from phalanx.launcher.bench.stages import busy_shares
from phalanx.launcher.comm_view import comm_table, comm_words
from phalanx.launcher.sizes import format_bytes


def report_view(report: BenchReport) -> RenderableType:
    config, num_rounds = report.config, report.options.num_rounds
    rounds = f"{num_rounds} round{'s' if num_rounds > 1 else ''} after one to warm up"
    parts: list[RenderableType] = [
        Text.assemble((f"{config['model']}, {config['dtype']}, {config['layout']}", "bold"), f"; {rounds}")
    ]
    for result in report.results:
        parts += [Text(), _title(report, result), _table(report, result)]
        for use in result.rounds[-1].comm:
            parts += [Text(), comm_table(use), *map(Text, comm_words(use))]
    return Group(*parts, Text(), _costs(report))


def _title(report: BenchReport, result: JobResult) -> Text:
    name, limits = result.job.name, report.options.limits
    words = title(name, report.options)
    if name == "W4":
        words += (
            f"; goodput within {limits.time_to_first_token_s * 1e3:g} ms to the first token and "
            f"{limits.time_per_output_token_s * 1e3:g} ms for each after it"
        )
    return Text.assemble((name, "bold"), f"  {words}")


def _table(report: BenchReport, result: JobResult) -> Table:
    table = Table(box=None, padding=(0, 2), show_header=len(result.rounds) > 1)
    table.add_column()
    for heading in ("median", "least", "most") if len(result.rounds) > 1 else ("",):
        table.add_column(heading, justify="right")
    for words, spread, digits in _rows(report, result):
        values = ["-"] * 3 if spread is None else [f"{value:.{digits}f}" for value in spread]
        table.add_row(words, *values[: len(table.columns) - 1])
    return table


def _rows(report: BenchReport, result: JobResult) -> Iterator[tuple[str, Spread | None, int]]:
    """Title, values and decimals of each row."""
    rounds, limits = result.rounds, report.options.limits
    for name in FIGURES_OF[result.job.name]:
        figure = FIGURES[name]
        spread = Spread.over(figure.read(taken, limits) for taken in rounds)
        yield figure.title, spread and Spread(*(value * figure.scale for value in spread)), figure.digits
    for replica, stages in enumerate(rounds[0].stages):
        shares = [busy_shares(taken.stages[replica]) for taken in rounds]
        for stage in range(len(stages)):
            place = f"replica {replica}, stage {stage}" if len(rounds[0].stages) > 1 else f"stage {stage}"
            yield f"{place} busy, %", Spread.over(each[stage] * 100 for each in shares if each is not None), 1
    yield "steps", Spread.over(taken.steps for taken in rounds), 0
    yield "preemptions", Spread.over(taken.preemptions for taken in rounds), 0
    hits = Spread.over(100 * taken.cached_tokens / taken.prompt_tokens for taken in rounds)
    yield "prompt tokens found in the prefix cache, %", hits, 1


def _costs(report: BenchReport) -> Table:
    """Start-up and memory."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    seconds = report.startup_s
    parts = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items() if part != "total")
    table.add_row("start-up", f"{seconds['total']:.2f} s: {parts}")
    table.add_row("peak memory", _memory_words(report.peak_memory))
    return table


def _memory_words(memory: PeakMemory) -> str:
    def size(num_bytes: int | None) -> str:
        return "unknown" if num_bytes is None else format_bytes(num_bytes)

    words = f"{size(memory.ranks_bytes)} by all ranks, {size(memory.largest_rank_bytes)} by the largest, "
    words += f"{size(memory.process_bytes)} by this process"
    if memory.num_unknown and memory.ranks_bytes is not None:
        words += f"; unknown of {memory.num_unknown} ranks elsewhere"
    return words
