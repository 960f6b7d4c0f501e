"""A picture of what each rank did: bubbles are where a lane is blank, waits are dark. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phalanx.engine.messages import StageStep
from phalanx.launcher.bench.stages import busy_shares, full_span
from phalanx.launcher.trace import TracedRank, TracedRun, exposed_us

ZOOM_STEPS = 20
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright scheme
GREY, PALE, EXPOSED = "#666666", "#eeeeee", "#222222"
LANE, TITLE, AXIS = 0.32, 0.55, 0.45  # inches
BAR = 0.8  # of a lane
MARGIN, DIGIT = 0.008, 0.011  # of the width of the right panel: what the number in a bar takes
LEGEND = (
    "colours: computing, by micro-batch; dark: transfers that it waited for; busy shares are of the time between the "
    "dashed lines, while all ranks can have work"
)


class _Lane(NamedTuple):
    """waits_s: (begin, length) of each."""

    label: str
    steps: Sequence[StageStep]
    waits_s: Sequence[tuple[float, float]]


def plot_runs(title: str, runs: Sequence[tuple[str, TracedRun]], path: Path) -> None:
    """Writes a PNG with a row of two panels for each run: all of it, and some steps in its middle.

    A bar is a step on a rank, coloured by its micro-batch: as many colours take turns as there are stages. Steps are
    numbered from the start of the run. title: of the picture; runs: each with a title of its own.
    """
    lanes = [_lanes(run) for _, run in runs]
    heights = [len(each) * LANE + TITLE + AXIS for each in lanes]
    figure = Figure(figsize=(15, sum(heights) + TITLE), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.text(0.995, 0.99, LEGEND, fontsize=8, color=GREY, ha="right", va="top")
    panels = figure.subplots(len(runs), 2, squeeze=False, height_ratios=heights, width_ratios=(3, 2))
    for (name, run), mine, (whole, zoom) in zip(runs, lanes, panels, strict=True):
        zero_s = min((step.started_s for lane in mine for step in lane.steps), default=0.0)
        num_colours = max(2, 1 + max((rank.place.stage for rank in run.ranks), default=0))
        for panel in (whole, zoom):
            _draw_axes(panel, mine)
        _draw_lanes(whole, mine, zero_s, num_colours, edge=0.0)
        whole.set_title(name, fontsize=10, loc="left")
        for ranks in run.replicas:
            for when_s in full_span(_steps_of(ranks)) or ():
                whole.axvline((when_s - zero_s) * 1e3, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        _zoom(zoom, mine, zero_s, num_colours)
        if zoom.has_data():
            whole.axvspan(*zoom.get_xlim(), color=PALE, zorder=0)
    figure.savefig(path, format="png", dpi=130)


def _steps_of(ranks: Iterable[TracedRank]) -> list[Sequence[StageStep]]:
    return [rank.trace.steps for rank in ranks]


def _lanes(run: TracedRun) -> list[_Lane]:
    lanes = []
    for ranks in run.replicas:
        stages = _steps_of(ranks)
        shares, first = busy_shares(stages), min((step.step for steps in stages for step in steps), default=0)
        for number, (place, trace) in enumerate(ranks):
            label = f"rank {place.rank}, stage {place.stage}"
            if len(run.replicas) > 1:
                label = f"replica {place.replica}, {label}"
            if shares is not None:
                label += f"  {shares[number]:.0%} busy"
            steps = [step._replace(step=step.step - first) for step in trace.steps]
            lanes.append(_Lane(label, steps, [(start / 1e6, length / 1e6) for start, length in exposed_us(trace)]))
    return lanes


def _draw_axes(panel: Axes, lanes: Sequence[_Lane]) -> None:
    panel.set_ylim(max(1, len(lanes)) - 0.5, -0.5)  # stage 0 on top
    panel.set_yticks(range(len(lanes)), [lane.label for lane in lanes], fontsize=9)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8, colors=GREY)
    panel.set_xlabel("ms", fontsize=8, color=GREY, loc="right", labelpad=1)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(GREY)


def _draw_lanes(panel: Axes, lanes: Sequence[_Lane], zero_s: float, num_colours: int, *, edge: float) -> None:
    for place, lane in enumerate(lanes):
        bars = [((step.started_s - zero_s) * 1e3, (step.ended_s - step.started_s) * 1e3) for step in lane.steps]
        colours = [COLOURS[step.step % num_colours % len(COLOURS)] for step in lane.steps]
        panel.broken_barh(bars, (place - BAR / 2, BAR), facecolors=colours, edgecolors="white", linewidths=edge)
        waits = [((start_s - zero_s) * 1e3, length_s * 1e3) for start_s, length_s in lane.waits_s]
        panel.broken_barh(waits, (place - BAR / 2, BAR / 3), facecolors=EXPOSED, linewidths=0.0)


def _zoom(panel: Axes, lanes: Sequence[_Lane], zero_s: float, num_colours: int) -> None:
    """Draws the middle steps of the first lane, and what the others do meanwhile, with their numbers."""
    steps = lanes[0].steps if lanes else []
    middle = steps[max(0, (len(steps) - ZOOM_STEPS) // 2) :][:ZOOM_STEPS]
    if not middle:
        return
    from_s, until_s = middle[0].started_s, middle[-1].ended_s
    seen = [
        _Lane(
            lane.label,
            [step for step in lane.steps if step.ended_s > from_s and step.started_s < until_s],
            [(start_s, length_s) for start_s, length_s in lane.waits_s if from_s < start_s + length_s <= until_s],
        )
        for lane in lanes
    ]
    _draw_lanes(panel, seen, zero_s, num_colours, edge=0.6)
    panel.set_xlim((from_s - zero_s) * 1e3, (until_s - zero_s) * 1e3)
    panel.set_yticks([])
    words = f"steps {middle[0].step} to {middle[-1].step} of {len(steps)}"
    panel.set_title(words, fontsize=9, loc="right", color=GREY)
    for place, lane in enumerate(seen):
        for step in lane.steps:
            left_s, right_s = max(step.started_s, from_s), min(step.ended_s, until_s)
            number = str(step.step)
            if right_s - left_s > (MARGIN + DIGIT * len(number)) * (until_s - from_s):
                centre_ms = ((left_s + right_s) / 2 - zero_s) * 1e3
                panel.text(centre_ms, place, number, ha="center", va="center", fontsize=7, color="white")
