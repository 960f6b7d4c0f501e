"""Ranks of which some share a machine, all on this one: each takes itself to be where the test says. That every
operation is right is shown in `test_operations.py`, and over real links in `tests/multinode`.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.comm.hierarchical_ranks import (
    COUNTS,
    rank_chosen,
    rank_counts_sends,
    rank_dies,
    rank_entries,
    rank_is_late,
    rank_many_under_way,
    rank_moves_much,
    rank_sum_of_reals,
    rank_sums,
)
from tests.comm.rank_pool import DIED, RankPool
from tests.comm.test_operations import (
    filled,
    gathered,
    listed,
    rank_all_gather,
    rank_broadcast,
    rank_exchange,
    rank_reduce_scatter,
    value,
)

from phalanx.comm import choose_backend
from phalanx.errors import CommError

SEATINGS = {
    "two and two": "aabb",
    "two and two in turn": "abba",
    "three and one": "aaab",
    "one and three": "abbb",
    "two, one and one": "abca",
    "all on one": "aaaa",
    "each alone": "abcd",
}


class HierarchicalPool:
    """The pool with ranks on the machines that one letter each names."""

    def __init__(self, pool: RankPool, seating: str) -> None:
        self._pool = pool
        self.seating = seating

    def run(self, function: Any, **options: Any) -> list[Any]:
        return self._pool.run(function, len(self.seating), **self._defaults(), **options)

    def outcomes(self, function: Any, **options: Any) -> list[dict[str, Any]]:
        return self._pool.outcomes(function, len(self.seating), **self._defaults(), **options)

    def _defaults(self) -> dict[str, Any]:
        return {"backend": "hierarchical", "machines": list(self.seating)}


@pytest.fixture(params=SEATINGS, ids=lambda name: name.replace(" ", "-"))
def seated(pool: RankPool, request: pytest.FixtureRequest) -> HierarchicalPool:
    return HierarchicalPool(pool, SEATINGS[request.param])


@pytest.fixture
def two_and_two(pool: RankPool) -> HierarchicalPool:
    return HierarchicalPool(pool, "abba")


@pytest.mark.parametrize("op", ["sum", "max"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("count", COUNTS)
def test_every_element_is_combined(seated: HierarchicalPool, count: int, dtype: str, op: str) -> None:
    assert seated.run(rank_sums, count=count, dtype=dtype, op=op) == [0] * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_gathered_and_scattered_in_rank_order_wherever_the_ranks_are(
    seated: HierarchicalPool, dtype: str
) -> None:
    for rows in ([3, 3, 3, 3], [2, 0, 5, 1], [0, 0, 4, 0]):
        arguments = {"rows": rows, "dtype": dtype, "sized": True}
        assert seated.run(rank_all_gather, columns=7, **arguments) == [gathered(rows, 7)] * 4
        total = [
            [sum(value(rank, row * 3 + column) for rank in range(4)) for column in range(3)] for row in range(sum(rows))
        ]
        expected = [total[sum(rows[:rank]) : sum(rows[: rank + 1])] for rank in range(4)]
        assert seated.run(rank_reduce_scatter, **arguments) == expected


def test_so_it_is_where_all_carriers_have_a_share(seated: HierarchicalPool) -> None:
    for rows in ([10, 10, 10, 10], [3, 0, 40, 1]):
        assert seated.run(rank_moves_much, rows=rows) == [[True] * 3] * 4


def test_broadcasts_and_sends_arrive_from_every_rank_at_every_other(seated: HierarchicalPool) -> None:
    expected = [[value(root, index) for index in range(150)] for root in range(4)]
    assert seated.run(rank_broadcast, dtype="float32") == [expected] * 4
    for rank, answer in enumerate(seated.run(rank_exchange, dtype="float32")):
        sources = [source for source in range(4) if source != rank]
        assert answer == [
            [listed(filled(source * 4 + rank, shape, "float32").reshape(-1)) for shape in ([2, 9], [31])]
            for source in sources
        ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("count", COUNTS)
def test_sums_of_narrow_floats_are_rounded_twice_and_alike_on_all_ranks(
    seated: HierarchicalPool, count: int, dtype: str
) -> None:
    answers = seated.run(rank_sum_of_reals, count=count, dtype=dtype)
    # A rounding errs by half a unit at most, and both are of numbers no larger than the sum of what was added.
    assert all(error <= 1.01 for error, _ in answers)
    assert len({bits for _, bits in answers}) == 1


@pytest.mark.parametrize("count", COUNTS)
def test_collectives_keep_their_order_and_sends_pass_them(seated: HierarchicalPool, count: int) -> None:
    for rank, (total, sums, received) in enumerate(seated.run(rank_many_under_way, count=count)):
        assert total == [6.0]
        assert sums == [[4.0 * number] for number in (5, 4, 3, 2, 1)]
        assert received == [[float(peer)] for peer in range(4) if peer != rank]


def test_an_operation_is_one_in_the_ledger(two_and_two: HierarchicalPool) -> None:
    expected = [["barrier", 1, 0, True], ["all_reduce", 2, 4000, True], ["all_reduce", 3, 4000, True]]
    assert two_and_two.run(rank_entries, fresh=True) == [expected] * 4


def test_a_machine_sends_a_small_tensor_once_and_a_large_one_in_shares(two_and_two: HierarchicalPool) -> None:
    small, large = COUNTS
    assert two_and_two.run(rank_counts_sends, count=small) == [[2 * small], [2 * small], [], []]
    shares = two_and_two.run(rank_counts_sends, count=large)
    assert [len(share) for share in shares] == [1] * 4
    assert sum(share[0] for share in shares[::3]) == sum(share[0] for share in shares[1:3]) == 2 * large


# ---- failures: the letters say where the lost rank is, as seen from the others ----

LOST = {"a carrier": 1, "a rank that carries nothing": 2}


@pytest.mark.parametrize("where", LOST)
def test_a_late_rank_is_named_whichever_level_it_is_missing_from(two_and_two: HierarchicalPool, where: str) -> None:
    late = LOST[where]
    answers = two_and_two.outcomes(rank_is_late, fresh=True, timeout_s=1.0, key=f"late-{late}", late=late)
    told = {rank: answer["error"] for rank, answer in enumerate(answers) if rank != late}
    assert {error["type"] for error in told.values()} <= {"WaitTimeoutError", "PeerLostError"}
    waited = {rank: error for rank, error in told.items() if error["type"] == "WaitTimeoutError"}
    assert waited, told
    for rank, error in waited.items():
        assert error["missing"] == [late]
        assert "all_reduce #2 of group 'fresh-" in error["message"]
        assert f"not arrived: rank {late} " in error["message"]
        # Who is on another machine cannot tell a rank that is stuck from a link that is cut.
        assert (f"or the link between here and rank {late} is cut" in error["message"]) == (rank in (0, 3))


@pytest.mark.parametrize("where", LOST)
def test_a_killed_rank_ends_the_waits_on_both_machines(two_and_two: HierarchicalPool, where: str) -> None:
    victim = LOST[where]
    answers = two_and_two.outcomes(rank_dies, fresh=True, timeout_s=300.0, victim=victim)
    assert answers[victim] == DIED
    neighbour = 3 - victim  # on the machine of the victim, and number `victim` of the group, not of its machine
    for rank, answer in enumerate(answers):
        if rank != victim:
            assert answer["error"]["type"] == "PeerLostError"
    assert f"rank {victim} has ended" in answers[neighbour]["error"]["message"]


# ---- the choice ----


@pytest.mark.parametrize(
    ("seating", "backend", "reason"),
    [
        ("aabb", "hierarchical", "shared memory in a machine, TCP between machines: 2 + 2 ranks"),
        ("aaab", "hierarchical", "shared memory in a machine, TCP between machines: 3 + 1 ranks"),
        ("abcd", "hierarchical", "shared memory in a machine, TCP between machines: 1 + 1 + 1 + 1 ranks"),
        ("aaaa", "shm", "memory that processes of one machine share"),
    ],
)
def test_auto_takes_it_where_the_ranks_are_on_several_machines(
    pool: RankPool, seating: str, backend: str, reason: str
) -> None:
    for name, told in pool.run(rank_chosen, 4, machines=list(seating), fresh=True):
        assert name == backend
        assert reason in told


def test_it_is_refused_for_gpus() -> None:
    with pytest.raises(CommError, match="'hierarchical' cannot serve 4 ranks on 'cuda': it serves the CPU"):
        choose_backend("hierarchical", "cuda", 4)
