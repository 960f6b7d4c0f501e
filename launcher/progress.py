"""The start of a formation on the terminal: progress while it loads, then what it took and what was chosen."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

from phalanx.engine.messages import Progress as RankProgress
from phalanx.launcher.memory_view import memory_table
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.served import Startup
from phalanx.launcher.sizes import format_bytes
from phalanx.parallel.layout import RankPlace


class StartProgress:
    """A bar on standard error for all ranks together, with the part the slowest is at."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bars.add_task("starting ranks", total=None)
        self._latest: dict[RankPlace, RankProgress] = {}
        self._weights: dict[RankPlace, RankProgress] = {}

    def update(self, place: RankPlace, progress: RankProgress) -> None:
        self._latest[place] = progress
        if progress.part == "weights":
            self._weights[place] = progress
        counts: dict[str, int] = {}
        for each in self._latest.values():
            counts[each.part] = counts.get(each.part, 0) + 1
        words = ", ".join(f"{part} ({count})" for part, count in counts.items())
        self._bars.update(
            self._task,
            description=f"starting ranks: {words}",
            completed=sum(each.done for each in self._weights.values()),
            total=sum(each.total for each in self._weights.values()) or None,
        )

    def show_startup(self, startup: Startup, plan: RunPlan) -> None:
        """Prints what starting took and chose."""
        seconds = startup.startup_s
        parts = "  ".join(f"{part} {value:.2f} s" for part, value in seconds.items() if part != "total")
        self._console.print(f"[bold]{plan.layout}[/] ready in {seconds['total']:.2f} s   ({parts})")
        table = Table(box=None, padding=(0, 2), show_header=False)
        for decision in startup.decisions:
            table.add_row(decision.name, f"[bold]{decision.choice}[/]", decision.reason)
        read = sum(ready.bytes_read for ready in startup.ranks)
        held = sum(ready.weight_bytes for ready in startup.ranks)
        speed = read / max(seconds["weights"], 1e-9)
        table.add_row(
            "weights",
            f"[bold]{format_bytes(held)}[/]",
            f"held by all ranks; {format_bytes(read)} read at {speed / 1e9:.2f} GB/s",
        )
        self._console.print(table)
        memory = memory_table(startup.ranks)
        if memory is not None:
            self._console.print(memory)
            if plan.gpus_per_rank < 1:
                self._console.print("  (ranks share a GPU: what the others took meanwhile counts beside tensors, too)")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
