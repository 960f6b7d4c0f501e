"""What each rank holds of its GPU's memory, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from phalanx.engine.memory_book import FREE, PARTS
from phalanx.engine.messages import RankReady


def memory_table(ranks: Sequence[RankReady]) -> Table | None:
    """A row a rank, in the order given, in GiB; None where no rank has told the parts of its memory."""
    if not any(ready.memory for ready in ranks):
        return None
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("GiB of rank", *PARTS, FREE, "all"):
        table.add_column(name, justify="right")
    for ready in ranks:
        sizes = [ready.memory.get(part, 0) for part in (*PARTS, FREE)]
        table.add_row(str(ready.rank), *(f"{size / 2**30:.2f}" for size in (*sizes, sum(sizes))))
    return table
