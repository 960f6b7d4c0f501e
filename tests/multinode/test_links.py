"""What ranks notice of their links: one that is cut and restored, cut for good, or throttled while they use it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from tests.comm.rank_pool import RankPool
from tests.multinode.host_ranks import rank_reduces_until, rank_reduces_until_it_fails
from tests.multinode.netlab import Net

APART = [0, 2]  # a rank on alpha, where the store is, and one on beta
CUT_S = 1.5
LIMIT_S = 2.0


Act = Callable[[], None]


def run_while(act: Act, pool: RankPool, function: Callable[..., object], *arguments: Any, **options: Any) -> list[Any]:
    """What the ranks return, while `act` runs beside them from when they have written the file `started`."""
    with ThreadPoolExecutor(1) as executor:
        answers = executor.submit(pool.run, function, *arguments, fresh=True, **options)
        while not Path(options["started"]).exists() and not answers.done():
            time.sleep(0.01)
        if not answers.done():
            act()
        return answers.result()


def test_a_link_cut_and_restored_within_the_limit_delays_and_no_more(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    started, stop = tmp_path / "started", tmp_path / "stop"

    def cut_and_restore() -> None:
        net.cut("beta")
        time.sleep(CUT_S)
        net.restore("beta")
        stop.touch()

    files = {"started": str(started), "stop": str(stop)}
    runs = run_while(
        cut_and_restore, host_pool, rank_reduces_until, 2, workers=APART, timeout_s=25.0, count=100_000, **files
    )
    for times_s in runs:
        # Only the operation under way waits for the link, but what TCP sends again may make the next one wait too.
        assert max(times_s) > 0.8 * CUT_S


def test_a_link_cut_for_good_ends_the_wait_at_its_limit_and_names_who_did_not_come(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    answers = run_while(
        lambda: net.cut("gamma"),
        host_pool,
        rank_reduces_until_it_fails,
        3,
        workers=[0, 2, 3],
        timeout_s=LIMIT_S,
        count=50_000,
        started=str(tmp_path / "started"),
    )
    for rank, answer in enumerate(answers):
        assert answer["type"] == "WaitTimeoutError"
        told = f"all_reduce #{answer['number']} of group 'fresh-"
        assert told in answer["message"]
        assert f"on rank {rank} waited longer than {LIMIT_S:g} s; not arrived: rank " in answer["message"]
        # After it there is only the reading of what the others said; gloo by itself would wait for this.
        assert LIMIT_S <= answer["after_s"] < 2 * LIMIT_S + 10
    # On this side all miss the rank that was cut off; on the other side that one misses all.
    assert all(2 in answer["missing"] for answer in answers[:2])
    assert all("rank 2 is not waiting for any rank: busy, stuck or dead" in each["message"] for each in answers[:2])
    assert answers[2]["missing"] == [0, 1]


@pytest.mark.alone
def test_a_link_throttled_to_a_tenth_makes_the_run_slower_and_nothing_else(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    started, stop = tmp_path / "started", tmp_path / "stop"
    net.set_rate(200.0)

    def throttle() -> None:
        net.set_rate(20.0)
        time.sleep(1.5)
        stop.touch()

    files = {"started": str(started), "stop": str(stop)}
    for times_s in run_while(throttle, host_pool, rank_reduces_until, 2, workers=APART, count=125_000, **files):
        assert len(times_s) > 6
        assert median(times_s[-2:]) > 4 * median(times_s[:5])


def test_a_link_cut_between_hosts_with_several_ranks_is_told_on_all_of_them(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    answers = run_while(
        lambda: net.cut("beta"),
        host_pool,
        rank_reduces_until_it_fails,
        4,
        workers=[0, 1, 2, 4],
        backend="hierarchical",
        timeout_s=LIMIT_S,
        count=50_000,
        started=str(tmp_path / "started"),
    )
    for answer in answers:
        assert answer["type"] == "WaitTimeoutError"
        assert f"all_reduce #{answer['number']} of group 'fresh-" in answer["message"]
    # Where the store can be read, the neighbour is known to wait too; each carries on for nobody on the other host.
    assert [answer["missing"] for answer in answers[:2]] == [[2, 3]] * 2
    assert all({0, 1} <= set(answer["missing"]) for answer in answers[2:])
