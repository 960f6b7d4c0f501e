"""The roofline as a picture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from phalanx.kernels.ceilings import Ceilings
from phalanx.launcher.bench_kernels.measure import KernelReading

mpl.use("Agg")
from matplotlib import pyplot as plt


def plot_roofline(title: str, ceilings: Ceilings, readings: Sequence[KernelReading], path: Path) -> None:
    """Calculated a second over calculated a byte, of what calculates products; a series an operator."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    counted = [reading for reading in readings if reading.num_flops]
    intensities = [reading.num_flops / reading.num_bytes for reading in counted]
    ridge = ceilings.flops_per_s / ceilings.bytes_per_s
    ends = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    roof = [min(ceilings.flops_per_s, each * ceilings.bytes_per_s) / 1e9 for each in (ends[0], ridge, ends[1])]
    axes.plot([ends[0], ridge, ends[1]], roof, color="black", label="roofline")
    for operator in dict.fromkeys(reading.operator for reading in counted):
        points = [
            (intensity, reading.num_flops / reading.taken_us / 1e3)
            for intensity, reading in zip(intensities, counted, strict=True)
            if reading.operator == operator
        ]
        axes.scatter([x for x, _ in points], [y for _, y in points], label=operator, s=18)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
