"""A picture of when each stage worked on which step: bubbles are where a lane is blank. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phalanx.engine.messages import StageStep
from phalanx.launcher.bench.readings import Round
from phalanx.launcher.bench.stages import busy_shares, full_span

ZOOM_STEPS = 20
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Paul Tol's bright scheme
GREY, PALE = "#666666", "#eeeeee"
LANE, TITLE, AXIS = 0.32, 0.55, 0.45  # inches
BAR = 0.8  # of a lane
MARGIN, DIGIT = 0.008, 0.011  # of the width of the right panel: what the number in a bar takes
LEGEND = "colours: micro-batches; busy shares are of the time between the dashed lines, while all stages can have work"


class _Lane(NamedTuple):
    label: str
    steps: Sequence[StageStep]


def plot_rounds(title: str, rounds: Sequence[tuple[str, Round]], path: Path) -> None:
    """Writes a PNG with a row of two panels for each round: all of it, and some steps in its middle.

    A bar is a step on a stage, coloured by its micro-batch: as many colours take turns as there are stages. Steps are
    numbered from the start of the round. title: of the picture; rounds: each with a title of its own.
    """
    lanes = [_lanes(taken) for _, taken in rounds]
    heights = [len(each) * LANE + TITLE + AXIS for each in lanes]
    figure = Figure(figsize=(15, sum(heights) + TITLE), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.text(0.995, 0.99, LEGEND, fontsize=8, color=GREY, ha="right", va="top")
    panels = figure.subplots(len(rounds), 2, squeeze=False, height_ratios=heights, width_ratios=(3, 2))
    for (name, taken), mine, (whole, zoom) in zip(rounds, lanes, panels, strict=True):
        zero_s = min((step.started_s for lane in mine for step in lane.steps), default=0.0)
        num_colours = max(2, len(taken.stages[0]))
        for panel in (whole, zoom):
            _draw_axes(panel, mine)
        _draw_steps(whole, mine, zero_s, num_colours, edge=0.0)
        whole.set_title(name, fontsize=10, loc="left")
        for stages in taken.stages:
            for when_s in full_span(stages) or ():
                whole.axvline((when_s - zero_s) * 1e3, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        _zoom(zoom, mine, zero_s, num_colours)
        if zoom.has_data():
            whole.axvspan(*zoom.get_xlim(), color=PALE, zorder=0)
    figure.savefig(path, format="png", dpi=130)


def _lanes(taken: Round) -> list[_Lane]:
    lanes = []
    for number, stages in enumerate(taken.stages):
        shares, first = busy_shares(stages), min((step.step for steps in stages for step in steps), default=0)
        for stage, steps in enumerate(stages):
            place = f"stage {stage}" if len(taken.stages) == 1 else f"replica {number}, stage {stage}"
            label = place if shares is None else f"{place}  {shares[stage]:.0%} busy"
            lanes.append(_Lane(label, [step._replace(step=step.step - first) for step in steps]))
    return lanes


def _draw_axes(panel: Axes, lanes: Sequence[_Lane]) -> None:
    panel.set_ylim(len(lanes) - 0.5, -0.5)  # stage 0 on top
    panel.set_yticks(range(len(lanes)), [lane.label for lane in lanes], fontsize=9)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8, colors=GREY)
    panel.set_xlabel("ms", fontsize=8, color=GREY, loc="right", labelpad=1)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(GREY)


def _draw_steps(panel: Axes, lanes: Sequence[_Lane], zero_s: float, num_colours: int, *, edge: float) -> None:
    for place, lane in enumerate(lanes):
        bars = [((step.started_s - zero_s) * 1e3, (step.ended_s - step.started_s) * 1e3) for step in lane.steps]
        colours = [COLOURS[step.step % num_colours % len(COLOURS)] for step in lane.steps]
        panel.broken_barh(bars, (place - BAR / 2, BAR), facecolors=colours, edgecolors="white", linewidths=edge)


def _zoom(panel: Axes, lanes: Sequence[_Lane], zero_s: float, num_colours: int) -> None:
    """Draws the middle steps of the first lane, and what the others do meanwhile, with their numbers."""
    steps = lanes[0].steps
    middle = steps[max(0, (len(steps) - ZOOM_STEPS) // 2) :][:ZOOM_STEPS]
    if not middle:
        return
    from_s, until_s = middle[0].started_s, middle[-1].ended_s
    seen = [
        _Lane(lane.label, [step for step in lane.steps if step.ended_s > from_s and step.started_s < until_s])
        for lane in lanes
    ]
    _draw_steps(panel, seen, zero_s, num_colours, edge=0.6)
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
