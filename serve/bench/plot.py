"""A picture of a server over the rate of requests: throughput, and how long they wait. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from phalanx.launcher.trace_plot import COLOURS, GREY
from phalanx.serve.bench.points import read_figures
from phalanx.serve.bench.report import ServeReport

BLUE, RED, GREEN = COLOURS[:3]


def plot_report(report: ServeReport, path: Path) -> None:
    """Writes a PNG of four panels over the rate: requests/s, tokens/s, time to first token, time per output token."""
    points = sorted(report.points, key=lambda point: point.rate_per_s)
    rates = [point.rate_per_s for point in points]
    found = [read_figures(point, report.plan.limits) for point in points]
    limits, knee = report.plan.limits, report.knee

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(_title(report), fontsize=11, fontweight="bold", x=0.01, ha="left")
    (requests, tokens), (first, per_token) = figure.subplots(2, 2)

    _line(requests, rates, [each.arrived_per_s for each in found], GREY, "arrived")
    _line(requests, rates, [each.completed_per_s for each in found], BLUE, "completed")
    _line(requests, rates, [each.goodput_per_s for each in found], GREEN, "completed within the limits")
    requests.set_title("requests/s", fontsize=10, loc="left")
    _line(tokens, rates, [each.output_tokens_per_s for each in found], BLUE, "output tokens/s")
    tokens.set_title("output tokens/s", fontsize=10, loc="left")
    _line(first, rates, [_ms(each.time_to_first_token_p99_s) for each in found], RED, "p99")
    _line(first, rates, [_ms(each.time_to_first_token_p50_s) for each in found], BLUE, "p50")
    _latency(first, "time to first token, ms", limits.time_to_first_token_s)
    _line(per_token, rates, [_ms(each.time_per_output_token_p99_s) for each in found], RED, "p99")
    _line(per_token, rates, [_ms(each.time_per_output_token_p50_s) for each in found], BLUE, "p50")
    _latency(per_token, "time per output token (mean of a request), ms", limits.time_per_output_token_s)

    for panel in (requests, tokens, first, per_token):
        if knee is not None:
            panel.axvline(knee.rate_per_s, color=GREY, linewidth=1, label=f"knee, {knee.rate_per_s:g}/s")
        _dress(panel)
    for panel in (requests, tokens):
        panel.set_ylim(bottom=0)
    figure.savefig(path, format="png", dpi=130)


def _title(report: ServeReport) -> str:
    scale = report.plan.source.scale
    words = f"{report.server['model']}, lengths of {report.lengths or 'W4'}"
    return words if scale == 1 else f"{words} times {scale:g}"


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else value_s * 1e3


def _line(panel: Axes, rates: list[float], values: list[float | None], colour: str, label: str) -> None:
    gaps = [math.nan if value is None else value for value in values]
    panel.plot(rates, gaps, color=colour, marker="o", markersize=4, linewidth=1.5, label=label)


def _latency(panel: Axes, title: str, limit_s: float) -> None:
    panel.set_title(title, fontsize=10, loc="left")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()
    panel.axhline(limit_s * 1e3, color=RED, linewidth=0.8, linestyle=(0, (1, 2)), label=f"limit, {limit_s * 1e3:g} ms")


def _dress(panel: Axes) -> None:
    panel.set_xlim(left=0)
    panel.set_xlabel("requests/s offered", fontsize=8, color=GREY, loc="right", labelpad=1)
    panel.tick_params(labelsize=8, colors=GREY)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["bottom", "left"]].set_color(GREY)
    panel.legend(fontsize=8, frameon=False)
