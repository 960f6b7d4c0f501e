"""A picture of what transfers take over their size, beside the limit. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from phalanx.launcher.bench_comm.measure import GroupResult, SizeResult
from phalanx.launcher.sizes import format_bytes
from phalanx.launcher.trace_plot import COLOURS, GREY

WIDTH, HEIGHT = 3.6, 3.2  # inches of a panel


def plot_groups(title: str, groups: Sequence[GroupResult], path: Path) -> None:
    """Writes a PNG: a row for each group, a panel for each operation that has sizes, time over size on both log."""
    rows = [[(op, [size for size in found.sizes if size.op == op]) for op in _ops(found)] for found in groups]
    num_columns = max(1, *(len(row) for row in rows))
    size = (WIDTH * num_columns + 1.5, HEIGHT * len(rows) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(len(rows), num_columns, squeeze=False)
    for found, row, mine in zip(groups, rows, panels, strict=True):
        for panel in mine[len(row) :]:
            panel.set_axis_off()
        for (op, sizes), panel in zip(row, mine, strict=False):
            _draw(panel, found, sizes)
            panel.set_title(f"{found.group.name}: {op}, µs", fontsize=9, loc="left")
        if row:
            mine[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=130)


def _ops(found: GroupResult) -> list[str]:
    return list(dict.fromkeys(size.op for size in found.sizes if size.num_bytes))


def _draw(panel: Axes, found: GroupResult, sizes: Sequence[SizeResult]) -> None:
    bytes_ = [size.num_bytes for size in sizes]
    for place, backend in enumerate(found.backends):
        colour = COLOURS[place % len(COLOURS)]
        spreads = [[reading * 1e6 for reading in size.readings_s[backend.name]] for size in sizes]
        label = f"{backend.name}{' (taken)' if backend.name == found.chosen else ''}"
        medians = [size.median_s(backend.name) * 1e6 for size in sizes]
        panel.plot(bytes_, medians, color=colour, marker="o", markersize=3, linewidth=1.5, label=label)
        panel.fill_between(
            bytes_, [min(each) for each in spreads], [max(each) for each in spreads], color=colour, alpha=0.15
        )
    known = [(size.num_bytes, size.limit_s * 1e6) for size in sizes if size.limit_s is not None]
    if known:
        panel.plot(*zip(*known, strict=True), color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="limit")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(bytes_, [format_bytes(size) for size in bytes_], rotation=45)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.tick_params(labelsize=7, colors=GREY)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["bottom", "left"]].set_color(GREY)
