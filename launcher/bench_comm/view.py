"""How `phalanx bench comm` shows what it finds, as it finds it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text

from phalanx.launcher.bench_comm.limits import Limits
from phalanx.launcher.bench_comm.measure import GroupResult, Listener, SizeResult
from phalanx.launcher.bench_comm.report import RIVAL, gain
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.sizes import format_bytes


class Show(Listener):
    """Prints a table when it is full, and on `status` how far it is."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console = console
        self._status = status

    def on_progress(self, words: str) -> None:
        self._status.update(words)

    def on_group(self, found: GroupResult) -> None:
        self._console.print(group_view(found))

    def on_op(self, found: GroupResult, sizes: Sequence[SizeResult]) -> None:
        self._console.print(op_view(found, sizes))


def title_view(plan: RunPlan, hidden_size: int, num_rounds: int) -> RenderableType:
    """What is measured, and how to read it."""
    token = f"{hidden_size} x {plan.dtype}"
    return Group(
        Text(f"{plan.layout}; {plan.dtype} on {plan.device}, one thread a rank", style="bold"),
        Text(
            f"Sizes are of the longer tensor (the hidden state of a token: {token}). Times are those of a call on the "
            f"slowest rank, medians of {num_rounds} rounds; GB/s are size over time. `limit`: what memory, "
            "cores or the link were measured to allow."
        ),
    )


def group_view(found: GroupResult) -> RenderableType:
    """The backends and the limits of a group."""
    group = found.group
    ranks = ", ".join(str(rank) for rank in group.ranks)
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, reason in found.backends:
        table.add_row(name, ("taken by a run: " if name == found.chosen else "") + reason)
    for name, problem in found.refused.items():
        table.add_row(name, f"did not connect: {problem}")
    for name, words in _limit_rows(found.limits):
        table.add_row(name, words)
    return Group(Text(), Text(f"{group.name}: ranks {ranks}", style="bold"), table)


def _limit_rows(limits: Limits) -> list[tuple[str, str]]:
    one, every = limits.copy_one_bytes_per_s / 1e9, limits.copy_all_bytes_per_s / 1e9
    rows = [("memory", f"{one:.1f} GB/s read and written by one rank, {every:.1f} by all together")]
    if limits.word is not None:
        seen, way = limits.word.seen_s * 1e9, limits.word.way_s * 1e9
        rows.append(("core to core", f"{way:.0f} ns a word ({seen:.0f} with what Python takes to look)"))
    for link in limits.links:
        where = "between machines" if limits.apart else "over loopback"
        first, second = link.between
        rate, one_way = link.bytes_per_s / 1e9, link.one_way_s * 1e6
        rows.append((f"TCP {where}", f"{rate:.3g} GB/s, {one_way:.0f} µs one way (ranks {first} and {second})"))
    return rows


def op_view(found: GroupResult, sizes: Sequence[SizeResult]) -> RenderableType:
    """A row a size. The taken backend is marked."""
    names = [backend.name for backend in found.backends]
    best = found.chosen if found.chosen in names else names[0]
    rivals = RIVAL in names and best != RIVAL
    table = Table(box=None, padding=(0, 2), title=f"{sizes[0].op}, µs", title_justify="left", title_style="bold")
    headings = ["size"]
    for name in names:
        headings += [f"{name}{'*' if name == found.chosen else ''}", "GB/s"]
    headings += ["limit", f"{best}/limit"]
    if rivals:
        headings.append(f"{RIVAL}/{best}")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for size in sizes:
        cells = [format_bytes(size.num_bytes) if size.num_bytes else "-"]
        for name in names:
            cells += [_short(size.median_s(name) * 1e6), _rate(size, name)]
        limit_s = size.limit_s
        cells += ["-", "-"] if limit_s is None else [_short(limit_s * 1e6), _short(size.median_s(best) / limit_s)]
        if rivals:
            cells.append(_short(gain(size, best) or 0.0))
        table.add_row(*cells)
    return Group(Text(), table)


def _rate(size: SizeResult, name: str) -> str:
    return _short(size.num_bytes / size.median_s(name) / 1e9) if size.num_bytes else "-"


def _short(value: float) -> str:
    """Three figures, never in powers of ten."""
    digits = next((digits for limit, digits in ((0.0995, 3), (9.95, 2), (99.5, 1)) if value < limit), 0)
    return f"{value:.{digits}f}"
