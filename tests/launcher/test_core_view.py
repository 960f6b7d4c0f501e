from __future__ import annotations

from phalanx.engine.held_cores import HeldCores
from phalanx.engine.messages import RankReady
from phalanx.launcher.core_view import core_decisions


def ready(
    rank: int, cpus: tuple[int, ...], nodes: tuple[int, ...] = (), *, on: str = "a", why: str = "so"
) -> RankReady:
    return RankReady(rank, on, 1, {}, 0, 0, 0, cores=HeldCores(cpus, nodes, why))


def test_few_ranks_are_told_one_by_one() -> None:
    assert core_decisions([[ready(0, (0,), (0,)), ready(1, (1, 3), (1,))]]) == [
        ("cores", "rank 0: 0 (node 0), rank 1: 1,3 (node 1)", "so")
    ]


def test_ranks_of_replicas_are_told_apart() -> None:
    [(_, choice, _)] = core_decisions([[ready(0, (0,))], [ready(0, (1,))]])
    assert choice == "rank 0 of replica 0: 0, rank 0 of replica 1: 1"


def test_many_ranks_are_told_together() -> None:
    many = [ready(rank, (2 * rank, 2 * rank + 1), (rank // 4,)) for rank in range(8)]
    assert core_decisions([many]) == [("cores", "8 ranks on 0-15 (nodes 0-1), 2 each", "so")]


def test_machines_that_are_alike_share_a_row() -> None:
    hosts = [ready(2 * host + rank, (rank,), on=f"host{host}") for host in range(8) for rank in range(2)]
    assert core_decisions([hosts]) == [("cores", "2 ranks on 0-1, 1 each", "so; on 8 machines")]


def test_machines_that_differ_have_a_row_each() -> None:
    rows = core_decisions(
        [[ready(0, (0,)), ready(1, (1,)), ready(2, (), on="b", why="another run has taken its cores")]]
    )
    assert rows == [
        ("cores", "2 ranks on 0-1, 1 each", "so; on a"),
        ("cores", "any", "another run has taken its cores; on b"),
    ]


def test_a_rank_that_is_not_held_to_cores_is_told_with_the_reason() -> None:
    assert core_decisions([[ready(0, (0,)), ready(1, (), why="another run has taken its cores")]]) == [
        ("cores", "rank 0: 0, rank 1: any", "so; another run has taken its cores")
    ]
    assert core_decisions([[ready(0, (), why="one rank computes on all of them")]]) == [
        ("cores", "any", "one rank computes on all of them")
    ]
