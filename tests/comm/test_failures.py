"""What a rank is told when another one is missing, stuck or dead. Functions named `rank_*` run on each rank of the
pool.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator, GroupBrokenError, create_communicator
from phalanx.comm.board import RankStatus, find_causes
from phalanx.errors import CommError

DIED = {"error": {"type": "died"}}


def wait_until(store: Store, key: str, count: int) -> None:
    while store.add(key, 0) < count:
        time.sleep(0.02)


def rank_two_of_three(comm: Communicator, store: Store, key: str) -> object:
    comm.barrier()
    if comm.rank == 2:
        wait_until(store, key, 2)
        return None
    try:
        return comm.all_reduce(torch.ones(1, 576)).tolist()
    finally:
        store.add(key, 1)


def test_a_wait_past_its_limit_names_the_operation_and_the_missing_rank(any_pool: Any) -> None:
    answers = any_pool.outcomes(rank_two_of_three, 3, fresh=True, timeout_s=1.0, key=f"two-of-three-{any_pool.backend}")
    assert answers[2] == {"ok": None}
    told = [answer["error"] for answer in answers[:2]]
    late = [error for error in told if error["type"] == "WaitTimeoutError"]
    assert late, told
    for error in late:
        assert error["missing"] == error["guilty"] == [2]
        assert "all_reduce #2 of group 'fresh-" in error["message"]
        assert "(2,304 bytes)" in error["message"]
        assert "not arrived: rank 2 " in error["message"]
        assert f"rank 2 is on {socket.gethostname()}" in error["message"]
    # The other one may have seen the first one give up before its own limit; then it says that it is a symptom.
    assert {error["type"] for error in told} <= {"WaitTimeoutError", "PeerLostError"}


def rank_each_waits_for_the_other(comm: Communicator, store: Store, key: str) -> object:
    comm.barrier()
    if comm.rank == 2:
        wait_until(store, key, 1)
        return None
    try:
        if comm.rank == 0:
            return comm.recv(torch.empty(3), 1).tolist()
        return comm.all_reduce(torch.empty(3)).tolist()
    finally:
        store.add(key, 1)


def test_a_wait_past_its_limit_tells_where_the_missing_rank_is(any_pool: Any) -> None:
    answers = any_pool.outcomes(
        rank_each_waits_for_the_other, 3, fresh=True, timeout_s=1.5, key=f"cross-{any_pool.backend}"
    )
    messages = [answer["error"]["message"] for answer in answers[:2] if answer["error"]["type"] == "WaitTimeoutError"]
    assert any(
        ("recv #1 from rank 1" in message and "rank 1 is waiting in all_reduce #2" in message)
        or ("all_reduce #2" in message and "rank 0 is waiting in recv #1 with rank 1" in message)
        for message in messages
    ), answers
    for answer in answers[:2]:
        if answer["error"]["type"] == "WaitTimeoutError":
            assert answer["error"]["guilty"] == [2]  # not the one that waits for it


def rank_waits_elsewhere(comm: Communicator, store: Store, key: str) -> object:
    """Rank 0 waits for rank 1, and that in another group for rank 2, which is busy in layer 7."""
    comm.barrier()
    comm.ledger.begin_step(12)
    comm.ledger.layer = 3 + comm.rank
    if comm.rank == 0:
        try:
            return comm.all_reduce(torch.ones(8)).tolist()
        finally:
            store.add(key, 1)
    with create_communicator(
        comm.backend, rank=comm.rank - 1, size=2, rendezvous=store, group=key, timeout_s=30.0, ledger=comm.ledger
    ) as pair:
        if comm.rank == 2:
            comm.ledger.layer = 7
            wait_until(store, key, 1)
            return pair.send(torch.ones(8), 0).tolist()
        return pair.recv(torch.empty(8), 1).tolist()


def test_who_waits_in_another_group_is_not_blamed(any_pool: Any) -> None:
    key = f"elsewhere-{any_pool.backend}"
    first, second, third = any_pool.outcomes(rank_waits_elsewhere, 3, fresh=True, timeout_s=1.5, key=key)
    assert second == third == {"ok": [1.0] * 8}
    error = first["error"]
    assert error["type"] == "WaitTimeoutError"
    assert "in layer 3 (32 bytes)" in error["message"]
    assert error["missing"] == [1, 2]
    assert error["guilty"] == [2]
    assert f"rank 1 is waiting in recv #1 of group '{key}' with rank 1 there in layer 4" in error["message"]
    assert (
        "rank 2 is not waiting for any rank: busy, stuck or dead; last seen in layer 7 of step 12" in error["message"]
    )
    assert "The cause is most likely rank 2, not seen waiting for anybody" in error["message"]


def status(num_started: int, group: str = "g", peer: int | None = None, *, waiting: bool = True) -> RankStatus:
    return RankStatus(num_started, waiting, group, "recv" if peer is not None else "barrier", num_started, peer, 0, 0)


def test_the_cause_of_a_wait_is_found_over_those_that_wait_in_turn() -> None:
    chain = {1: status(4, peer=2), 2: status(4, peer=3), 3: status(4, waiting=False)}
    assert find_causes([1], chain, "g", 4, 0, 4) == ((3,), ())
    assert find_causes([1], {1: status(5, peer=2)}, "g", 3, 0, 5) == ((2,), ())


def test_ranks_that_wait_for_each_other_are_not_told_guilty() -> None:
    assert find_causes([1], {1: status(4, peer=0)}, "g", 2, 0, 4) == ((), ())
    circle = {1: status(6), 2: status(5, peer=1)}
    assert find_causes([1, 2], circle, "g", 3, 0, 5) == ((), ())


def test_a_cause_in_another_group_is_told_so() -> None:
    assert find_causes([1], {1: status(4, group="h", peer=5)}, "g", 2, 0, 4) == ((), (1,))


def rank_unlike_calls(comm: Communicator, store: Store) -> object:
    if comm.rank == 0:
        return comm.all_gather(torch.ones(4)).tolist()
    return comm.broadcast(torch.ones(4), 0).tolist()


def test_ranks_that_make_unlike_calls_are_told_so(any_pool: Any) -> None:
    answers = any_pool.outcomes(rank_unlike_calls, 2, fresh=True, timeout_s=1.0)
    assert any("the ranks do not make the same calls" in answer["error"]["message"] for answer in answers), answers


def rank_killed(comm: Communicator, store: Store, op: str, victim: int) -> object:
    comm.barrier()
    if comm.rank == victim:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if op == "all_reduce":
            comm.all_reduce(torch.ones(64))
        else:
            comm.recv(torch.ones(64), victim)
    except GroupBrokenError:
        with pytest.raises(GroupBrokenError, match="cannot run: the connection to"):
            comm.barrier()
        raise
    return None


@pytest.mark.parametrize(("op", "peer"), [("all_reduce", None), ("recv", 3)])
def test_a_killed_rank_ends_the_waits_of_all_others_before_their_limit(
    any_pool: Any, op: str, peer: int | None
) -> None:
    # The limit on waiting is far above the pool's own limit on an answer: only the lost connection can end these waits.
    answers = any_pool.outcomes(rank_killed, 4, fresh=True, timeout_s=300.0, op=op, victim=3)
    assert answers[3] == DIED
    for answer in answers[:3]:
        error = answer["error"]
        assert error["type"] == "PeerLostError"
        assert error["peer"] == peer
        assert f"{op} #" in error["message"]
        assert "this is a symptom" in error["message"]


def rank_aborted(comm: Communicator, store: Store) -> object:
    comm.barrier()
    if comm.rank == 0:
        threading.Timer(0.2, comm.abort).start()
    comm.recv(torch.empty(3), 1 - comm.rank)
    return None


def test_abort_from_another_thread_ends_the_waits_of_all_ranks(any_pool: Any) -> None:
    first, second = any_pool.outcomes(rank_aborted, 2, fresh=True, timeout_s=300.0)
    assert first["error"]["type"] == "GroupBrokenError"
    assert "aborted on rank 0" in first["error"]["message"]
    assert second["error"]["type"] == "PeerLostError"


def rank_closes_early(comm: Communicator, store: Store, key: str, pause_s: float) -> object:
    comm.barrier()
    if comm.rank == 0:
        comm.all_reduce(torch.ones(3), async_op=True)
        time.sleep(pause_s)
        comm.close()
        comm.close()
        with pytest.raises(CommError, match="has been closed"):
            comm.barrier()
        store.add(key, 1)
    else:
        wait_until(store, key, 1)
        total = torch.ones(3)
        with pytest.raises(GroupBrokenError):
            # What rank 0 had sent before it closed may arrive: then this sum is whole, and the next one fails.
            comm.all_reduce(total)
            assert total.tolist() == [2.0] * 3
            comm.all_reduce(total)
    return True


@pytest.mark.parametrize("pause_s", [0.0, 0.2])
def test_closing_with_an_operation_under_way_does_not_hang(any_pool: Any, pause_s: float) -> None:
    key = f"closes-early-{any_pool.backend}-{pause_s}"
    answers = any_pool.run(rank_closes_early, 2, fresh=True, timeout_s=300.0, key=key, pause_s=pause_s)
    assert answers == [True, True]


def rank_slow_peer(comm: Communicator, store: Store) -> object:
    comm.barrier()
    if comm.rank == 1:
        time.sleep(1.5)
    comm.all_reduce(torch.ones(3))
    return [entry.waited_us for entry in comm.ledger.entries() if entry.op == "all_reduce"]


def test_a_slow_rank_is_no_error_and_the_ledger_shows_the_wait(any_pool: Any) -> None:
    waiting, _ = any_pool.run(rank_slow_peer, 2, fresh=True, timeout_s=20.0)
    assert waiting[0] > 1_000_000
