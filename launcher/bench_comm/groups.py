"""What is measured: the groups of a layout, the operations, and the bytes that each has to move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from phalanx.parallel.layout import Layout

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "send_recv"]
OPS: tuple[Op, ...] = get_args(Op)


class CommGroup(NamedTuple):
    """Ranks that share a communicator.

    ranks: their numbers in the replica; a rank's number in the group is its place among them. pair: numbers in the
    group of the two that `send_recv` goes between. ops: what is measured here.
    """

    name: str
    ranks: tuple[int, ...]
    pair: tuple[int, int]
    ops: tuple[Op, ...]


def layout_groups(layout: Layout, ops: Sequence[Op]) -> list[CommGroup]:
    """The tensor group of each stage of two ranks or more, then each border of the pipeline, with those of `ops` that
    mean something there.

    A border's communicator is that of the whole pipeline, as in a run; it is measured between the first ranks of the
    two stages.
    """
    stages = [
        CommGroup(f"stage {stage.index}", tuple(layout.stage_ranks(stage.index)), (0, 1), tuple(ops))
        for stage in layout.stages
        if stage.num_ranks > 1
    ]
    borders = [
        CommGroup(
            f"stage {index} to {index + 1}",
            tuple(range(layout.num_ranks)),
            (layout.first_rank(index), layout.first_rank(index + 1)),
            ("send_recv",),
        )
        for index in range(len(layout.stages) - 1)
        if "send_recv" in ops
    ]
    return stages + borders


def num_elements(op: Op, num_bytes: int, itemsize: int, size: int) -> int:
    """Elements of the longer tensor of an operation, for about `num_bytes`: at least one for each of `size` ranks."""
    if op == "barrier":
        return 0
    granule = size if op in ("all_gather", "reduce_scatter") else 1
    return max(1, round(num_bytes / itemsize / granule)) * granule


def touched_share(op: Op, size: int) -> float:
    """Bytes that the busiest rank must read and write at the least, in proportion to copying the longer tensor.

    An all-reduce reads a tensor and writes one, like a copy. An all-gather of N bytes reads N / size and writes N; a
    reduce-scatter the other way round. Of a broadcast or a transfer, a rank only reads or only writes.
    """
    match op:
        case "all_reduce":
            return 1.0
        case "all_gather" | "reduce_scatter":
            return (1 + 1 / size) / 2
        case "broadcast" | "send_recv":
            return 0.5
        case "barrier":
            return 0.0


def crossing_share(op: Op, machines: Sequence[int]) -> float:
    """Bytes that some machine must take in or give out at the least, in proportion to the longer tensor.

    machines: of each rank. What a machine adds up or holds itself need not travel: of an all-gather it lacks the parts
    of the ranks elsewhere, of a reduce-scatter it owes them theirs.
    """
    match op:
        case "all_reduce" | "broadcast" | "send_recv":
            return 1.0
        case "all_gather" | "reduce_scatter":
            return 1 - min(machines.count(machine) for machine in machines) / len(machines)
        case "barrier":
            return 0.0


def border_machines(group: CommGroup, machines: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of numbers in the group, one for each two machines that follow each other."""
    first: dict[int, int] = {}
    for number in group.pair if group.ops == ("send_recv",) else range(len(group.ranks)):
        first.setdefault(machines[number], number)
    numbers = list(first.values())
    yield from pairwise(numbers)
