from __future__ import annotations

from rich.console import Console

from phalanx.engine.messages import RankReady
from phalanx.launcher.memory_view import memory_table


def ready(rank: int, memory: dict[str, int]) -> RankReady:
    return RankReady(rank, "node", 1, {}, 0, 0, 0, memory=memory)


def test_each_rank_has_a_row_of_its_parts_and_their_sum() -> None:
    table = memory_table(
        [ready(0, {"weights": 3 * 2**30, "KV pages": 2**30, "free": 2**29}), ready(1, {"free": 2**28})]
    )
    assert table is not None
    console = Console(width=160)
    with console.capture() as shown:
        console.print(table)
    heading, first, second = shown.get().splitlines()
    names = "GiB of rank,in use before,weights,KV pages,activations,graphs,communicators,workspaces,free,all"
    assert "".join(heading.split()) == names.replace(",", "").replace(" ", "")
    assert first.split() == ["0", "0.00", "3.00", "1.00", *["0.00"] * 4, "0.50", "4.50"]
    assert second.split() == ["1", *["0.00"] * 7, "0.25", "0.25"]


def test_there_is_no_table_where_nothing_is_told() -> None:
    assert memory_table([ready(0, {}), ready(1, {})]) is None
