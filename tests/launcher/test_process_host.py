"""Formations of plain processes: what a user sees when ranks run, fail and end, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tests.launcher.fake_ranks import ECHO, make_specs
from tests.launcher.machines import can_divide_cores

from phalanx.engine.messages import Progress, StepResult
from phalanx.errors import PlacementError, RankFailedError
from phalanx.launcher.formation import Formation
from phalanx.launcher.hosts import ClusterSettings
from phalanx.launcher.process_host import ProcessHost
from phalanx.launcher.thread_host import ThreadHost
from phalanx.launcher.topology import read_topology
from phalanx.parallel.layout import RankPlace, StageRequest

ROOT = Path(__file__).parents[2]
TARGET = "tests.launcher.fake_ranks:run"
SETTINGS = ClusterSettings(ray="none", start_timeout_s=60)


@pytest.fixture(autouse=True)
def _fakes_are_importable_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


def start(
    *stages: StageRequest | int,
    behaviour: str = "serve",
    settings: ClusterSettings = SETTINGS,
    on_progress: Callable[[RankPlace, Progress], None] | None = None,
) -> Formation:
    specs = make_specs(*stages, behaviour=behaviour)
    return Formation.start(specs, settings, on_progress=on_progress, host=ProcessHost(settings, TARGET))


def failure(formation: Formation, within_s: float = 20.0) -> RankFailedError:
    with pytest.raises(RankFailedError) as failed:
        formation.submit(ECHO)
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            formation.receive(1.0)
    return failed.value


def wait_until_gone(pids: list[int], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} still there: {[pid for pid in pids if psutil.pid_exists(pid)]}"
        time.sleep(0.02)


def test_ranks_run_under_the_command_they_are_started_by() -> None:
    host = ProcessHost(SETTINGS, TARGET, prefix=("nice", "-n", "1"))
    with Formation.start(make_specs(2), SETTINGS, host=host) as formation:
        assert [psutil.Process(ready.pid).nice() for ready in formation.ready] == [psutil.Process().nice() + 1] * 2


def test_a_step_that_nobody_answers_for_is_an_error_and_the_ranks_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.launcher.step_watch.SLACK_S", 0.0)
    specs = [
        replace(spec, comm=replace(spec.comm, timeout_s=0.3))
        for spec in make_specs(1, 1, behaviour="serve,ignore-step")
    ]
    with Formation.start(specs, SETTINGS, host=ProcessHost(SETTINGS, TARGET)) as formation:
        error = failure(formation)
        assert error.rank == 0  # no stage has told anything
        assert "has had no result for " in str(error)
        with pytest.raises(RankFailedError):
            formation.receive(1.0)


def test_ranks_start_answer_and_end() -> None:
    heard: list[tuple[RankPlace, Progress]] = []
    with start(2, 1, on_progress=lambda place, progress: heard.append((place, progress))) as formation:
        assert [ready.rank for ready in formation.ready] == [0, 1, 2]
        assert {place.rank for place, _ in heard} == {0, 1, 2}
        formation.submit(ECHO)
        result = formation.receive(10.0)
        assert isinstance(result, StepResult)
        assert result.step == ECHO.step
        assert formation.receive(0.2) is None
        assert set(formation.startup_s) == {"ray", "actors"}
        pids = [ready.pid for ready in formation.ready]
        assert len({*pids, os.getpid()}) == 4
    wait_until_gone(pids)


def test_ranks_share_the_cores_of_the_machine() -> None:
    with start(2) as formation:
        threads = str(max(1, read_topology().num_usable // 2))
        assert [(r.choices["threads"], r.choices["omp"]) for r in formation.ready] == [(threads, threads)] * 2


@pytest.mark.alone
def test_ranks_keep_to_cores_of_their_own_and_other_runs_off_them() -> None:
    if not can_divide_cores():
        pytest.skip("needs two cores of unlimited time that no other run has taken")
    with start(2) as formation:
        held = [ready.cores.cpus for ready in formation.ready]
        assert all(held)
        assert not set(held[0]) & set(held[1])
        assert [ready.choices["cpus"] for ready in formation.ready] == [" ".join(map(str, cpus)) for cpus in held]
        with start(2) as other:
            every = " ".join(map(str, sorted(os.sched_getaffinity(0))))
            assert [ready.choices["cpus"] for ready in other.ready] == [every] * 2
            assert {ready.cores.reason for ready in other.ready} == {"another run has taken its cores"}
    with start(2) as formation:
        assert [ready.cores.cpus for ready in formation.ready] == held


def test_ranks_stay_where_they_are_if_so_configured() -> None:
    with start(2, settings=replace(SETTINGS, pin_cores=False)) as formation:
        every = " ".join(map(str, sorted(os.sched_getaffinity(0))))
        assert [ready.choices["cpus"] for ready in formation.ready] == [every] * 2
        assert [ready.cores.reason for ready in formation.ready] == ["cluster.pin_cores is false"] * 2


def test_ranks_with_gpus_each_see_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    settings = ClusterSettings(ray="none", device="cuda", gpus_per_rank=0.5)
    with start(2, 1, settings=settings) as formation:
        assert [ready.choices["gpu"] for ready in formation.ready] == ["3", "3", "5"]


def test_replicas_take_different_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    settings = ClusterSettings(ray="none", device="cuda")
    layout = replace(make_specs(1)[0].layout, replicas=2)
    specs = [replace(spec, layout=layout, replica=1) for spec in make_specs(1)]
    with Formation.start(specs, settings, host=ProcessHost(settings, TARGET)) as formation:
        assert formation.ready[0].choices["gpu"] == "5"


def test_more_ranks_than_gpus_are_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(PlacementError, match="GPU: 2 needed, 1 free of 1"):
        start(2, settings=ClusterSettings(ray="none", device="cuda"))


def test_a_node_that_is_not_this_machine_is_refused() -> None:
    with pytest.raises(PlacementError, match="asks for node 'elsewhere'"):
        start(StageRequest(2, node="elsewhere"))


def test_a_rank_killed_from_outside_is_named_with_its_signal() -> None:
    with start(1, 2) as formation:
        os.kill(formation.ready[1].pid, signal.SIGKILL)
        error = failure(formation)
    assert error.rank == 1
    assert "rank 1 (replica 0, stage 1, tensor rank 0) on node" in str(error)
    assert "killed by SIGKILL" in str(error)


def test_a_rank_killed_while_the_engine_is_idle_is_noticed() -> None:
    with start(2) as formation, pytest.raises(RankFailedError, match="killed by SIGKILL"):
        threading.Timer(0.3, os.kill, (formation.ready[0].pid, signal.SIGKILL)).start()
        formation.receive(20.0)


def test_the_last_words_of_a_killed_rank_are_in_the_error() -> None:
    with start(2, behaviour="serve,killed-in-step") as formation:
        assert "last words of the rank" in str(failure(formation))


def test_a_crash_brings_the_python_stack_of_the_rank() -> None:
    with start(2, behaviour="serve,segfault-in-step") as formation:
        error = failure(formation)
    assert "killed by SIGSEGV" in str(error)
    assert "_step" in str(error)


def test_an_exception_brings_the_traceback_of_the_rank() -> None:
    with start(2, behaviour="serve,fail-in-step") as formation:
        error = failure(formation)
    assert "tensor lm_head is truncated" in str(error)
    assert "_read_broken_file" in str(error)


def test_the_error_stays_the_same_when_asked_again() -> None:
    with start(2, behaviour="serve,fail-in-step") as formation:
        error = failure(formation)
        with pytest.raises(RankFailedError) as again:
            formation.check()
        assert again.value is error


def test_a_killed_rank_comes_before_what_its_neighbours_suffered() -> None:
    with start(3, behaviour="symptom-in-step,killed-in-step,symptom-in-step") as formation:
        error = failure(formation)
    assert error.rank == 1
    assert any("all_reduce 12" in symptom for symptom in error.symptoms)


def test_a_cause_that_is_told_after_its_symptom_still_comes_first() -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 .*truncated") as failed:
        start(2, behaviour="quick-symptom,late-cause")
    assert failed.value.rank == 1
    assert failed.value.symptoms[0].startswith("rank 0 ")


def test_a_failure_that_only_the_process_could_tell_has_its_traceback() -> None:
    with pytest.raises(RankFailedError, match="said nothing over the channel") as failed:
        start(2, behaviour="serve,mute")
    assert 'raise ValueError("said nothing over the channel")' in str(failed.value)


def test_a_rank_that_returns_unasked_is_a_failure() -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 .*ended without being asked to"):
        start(2, behaviour="serve,exit-at-once")


def test_a_start_that_takes_too_long_says_where_each_rank_was() -> None:
    settings = ClusterSettings(ray="none", start_timeout_s=2)
    host = ProcessHost(settings, TARGET)
    while host.imports_s is None:  # which the limit need not cover where a host is opened early
        host.exits()
        time.sleep(0.02)
    with pytest.raises(RankFailedError, match="1 of 2 ranks were not ready within 2 s") as failed:
        Formation.start(make_specs(2, behaviour="serve,hang-in-start"), settings, host=host)
    assert "rank 1 (replica 0, stage 0, tensor rank 1) on node" in str(failed.value)
    assert "at weights, 1 of 2" in str(failed.value)


def test_a_target_that_cannot_be_imported_brings_its_traceback() -> None:
    host = ProcessHost(SETTINGS, "no_such_package.ranks:run")
    with pytest.raises(RankFailedError, match="No module named 'no_such_package'"):
        Formation.start(make_specs(2), SETTINGS, host=host)


def test_a_rank_that_ignores_its_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.launcher.formation.SHUTDOWN_S", 0.3)
    formation = start(2, behaviour="serve,ignore-shutdown")
    formation.close()
    wait_until_gone([ready.pid for ready in formation.ready], 0.5)


def test_closing_twice_is_closing_once() -> None:
    formation = start(2)
    formation.close()
    formation.close()


def test_ranks_end_when_their_parent_is_killed() -> None:
    with start(2) as formation:
        nursery = psutil.Process(formation.ready[0].pid).parent()
        assert nursery is not None
        nursery.kill()
        error = failure(formation)
        assert "parent process of the ranks was killed by SIGKILL" in str(error)
        wait_until_gone([ready.pid for ready in formation.ready])


def test_ranks_end_when_the_engine_is_killed() -> None:
    program = (
        "from tests.launcher.test_process_host import start\n"
        "import time\n"
        "formation = start(2)\n"
        "print(*(ready.pid for ready in formation.ready), flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT) as engine:
        assert engine.stdout is not None
        pids = [int(pid) for pid in engine.stdout.readline().split()]
        assert len(pids) == 2
        parents = [parent.pid for pid in pids if (parent := psutil.Process(pid).parent())]
        engine.kill()
    wait_until_gone([*pids, *parents])


def test_an_interrupt_while_starting_leaves_nothing_behind() -> None:
    def interrupt(place: RankPlace, progress: Progress) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        start(2, behaviour="hang-in-start", on_progress=interrupt)


def test_a_world_of_one_runs_in_this_process() -> None:
    with Formation.start(make_specs(1), SETTINGS, host=ThreadHost(SETTINGS, TARGET)) as formation:
        assert formation.ready[0].pid == os.getpid()
        formation.submit(ECHO)
        assert formation.receive(10.0) is not None
    assert not [thread for thread in threading.enumerate() if thread.name == "phalanx-rank"]


def test_a_world_of_one_reports_its_failure() -> None:
    with pytest.raises(RankFailedError, match="truncated"):
        Formation.start(make_specs(1, behaviour="bad-weights"), SETTINGS, host=ThreadHost(SETTINGS, TARGET))
