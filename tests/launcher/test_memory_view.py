from __future__ import annotations

from rich.console import Console

from phalanx.engine.messages import RankReady
from phalanx.launcher.memory_view import memory_table


def ready(rank: int, memory: dict[str, int]) -> RankReady:
    return RankReady(rank, "node", 1, {}, 0, 0, 0, memory=memory)


def test_each_rank_has_a_row_of_its_parts_and_their_sum() -> None:
    table = memory_table(
        [ready(0, {"weights": 3 * 2**30, "KV pages": 2**30, "free": 2**29}), ready(1, {"free": 2**20})]
    )
    assert table is not None
    console = Console(width=160)
    with console.capture() as shown:
        console.print(table)
    heading, first, second = (
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in shown.get().splitlines()
    )
    assert heading == [
        *("rank", "in use before", "weights", "KV pages", "activations", "graphs", "communicators", "workspaces"),
        *("free", "all"),
    ]
    assert first == ["0", "0 B", "3 GiB", "1 GiB", "0 B", "0 B", "0 B", "0 B", "512 MiB", "4.5 GiB"]
    assert second == ["1", *["0 B"] * 7, "1 MiB", "1 MiB"]


def test_there_is_no_table_where_nothing_is_told() -> None:
    assert memory_table([ready(0, {}), ready(1, {})]) is None
