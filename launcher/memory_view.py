"""What each rank holds of its GPU's memory, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from phalanx.engine.memory_book import FREE, PARTS
from phalanx.engine.messages import RankReady
from phalanx.launcher.sizes import format_bytes


def memory_table(ranks: Sequence[RankReady]) -> Table | None:
    """A row a rank, in the order given; None where no rank has told the parts of its memory."""
    if not any(ready.memory for ready in ranks):
        return None
    table = Table(box=None, padding=(0, 2))
    for name in ("rank", *PARTS, FREE, "all"):
        table.add_column(name, justify="right")
    for ready in ranks:
        sizes = [ready.memory.get(part, 0) for part in (*PARTS, FREE)]
        table.add_row(str(ready.rank), *map(format_bytes, (*sizes, sum(sizes))))
    return table
