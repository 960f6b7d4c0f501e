"""Formations on Ray: on a private one of this machine, and on a cluster of two raylets that stand for two nodes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.launcher.fake_ranks import ECHO, make_specs
from tests.launcher.machines import can_divide_cores
from tests.launcher.ray_folder import make_ray_folder

from phalanx.errors import PhalanxError, PlacementError, RankFailedError
from phalanx.launcher.formation import Formation
from phalanx.launcher.hosts import ClusterSettings
from phalanx.launcher.ray_cluster import RayCluster, reread_token
from phalanx.launcher.ray_host import RayHost
from phalanx.launcher.topology import read_topology
from phalanx.parallel.layout import StageRequest

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'phalanx[ray]'")

ROOT = Path(__file__).parents[2]
TARGET = "tests.launcher.fake_ranks:run"
SETTINGS = ClusterSettings(ray="local")


@pytest.fixture(scope="module", autouse=True)
def _fakes_are_importable_in_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield


def start(*stages: StageRequest | int, behaviour: str = "serve", settings: ClusterSettings = SETTINGS) -> Formation:
    specs = make_specs(*stages, behaviour=behaviour)
    return Formation.start(specs, settings, host=RayHost(settings, len(specs), TARGET))


def answers(formation: Formation) -> bool:
    formation.submit(ECHO)
    return formation.receive(20.0) is not None


def failure(formation: Formation, within_s: float = 40.0) -> RankFailedError:
    with pytest.raises(RankFailedError) as failed:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            formation.receive(1.0)
    return failed.value


def live_groups() -> list[dict[str, Any]]:
    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


class TestPrivateRay:
    """`cluster.ray: local`."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def private(cls) -> Iterator[RayCluster]:
        """Held open, so that the tests share one Ray; its end is what is tested last."""
        children = set(psutil.Process().children(recursive=True))
        environment = dict(os.environ)
        handler = signal.getsignal(signal.SIGTERM)
        token = Path.home() / ".ray" / "auth_token"
        had_token = token.exists()
        cluster = RayCluster("local", 2)
        directory = Path(ray._private.worker._global_node.get_session_dir_path()).parent
        yield cluster
        cluster.close()
        assert not ray.is_initialized()
        assert not set(psutil.Process().children(recursive=True)) - children
        assert not directory.exists()
        assert token.exists() == had_token
        assert {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")} == {
            name: value for name, value in environment.items() if name.startswith("RAY_AUTH")
        }
        assert signal.getsignal(signal.SIGTERM) is handler

    def test_ray_starts_without_what_watches_a_cluster(self) -> None:
        commands = [" ".join(child.cmdline()) for child in psutil.Process().children()]
        assert any("raylet" in command for command in commands)
        assert not [command for command in commands if "monitor.py" in command]

    @pytest.mark.alone
    def test_formations_run_side_by_side_and_share_the_cores(self) -> None:
        can_divide = can_divide_cores()
        with start(2) as first, start(1) as second:
            assert answers(first)
            assert answers(second)
            assert first.startup_s["actors"] > 0
            cores = read_topology().num_usable
            if can_divide:
                held = [ready.cores.cpus for ready in first.ready]
                assert not set(held[0]) & set(held[1])
                assert [ready.choices["cpus"] for ready in first.ready] == [" ".join(map(str, each)) for each in held]
            assert [ready.choices["threads"] for ready in first.ready] == [str(max(1, cores // 2))] * 2
            assert first.ready[0].choices["threads"] == first.ready[0].choices["omp"]
            pids = [ready.pid for formation in (first, second) for ready in formation.ready]
            assert len({*pids, os.getpid()}) == 4
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert not live_groups()

    def test_a_killed_actor_is_named_and_standard_output_stays_clean(self, capfd: pytest.CaptureFixture[str]) -> None:
        with start(2) as formation:
            os.kill(formation.ready[1].pid, signal.SIGKILL)
            started = time.monotonic()
            error = failure(formation)
            assert time.monotonic() - started < 10
        assert error.rank == 1
        assert "rank 1 (replica 0, stage 0, tensor rank 1) on node" in str(error)
        assert "killed or crashed" in str(error)
        assert capfd.readouterr().out == ""
        assert not live_groups()

    def test_a_rank_that_fails_while_starting_brings_its_own_traceback(self) -> None:
        with pytest.raises(RankFailedError, match="tensor lm_head is truncated") as failed:
            start(2, behaviour="slow-symptom,bad-weights")
        assert failed.value.rank == 1
        assert "_read_broken_file" in str(failed.value)
        assert not live_groups()

    def test_a_failure_that_only_the_actor_could_tell_has_its_traceback(self) -> None:
        with pytest.raises(RankFailedError, match="said nothing over the channel") as failed:
            start(1, behaviour="mute")
        assert 'raise ValueError("said nothing over the channel")' in str(failed.value)

    def test_another_cluster_cannot_be_joined_meanwhile(self) -> None:
        with pytest.raises(PhalanxError, match=r"while this process uses Ray with cluster\.ray: local"):
            RayCluster("auto", 1)


class TestTwoNodes:
    """`cluster.ray: host:port`."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def cluster(cls) -> Iterator[Any]:
        from ray.cluster_utils import Cluster

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
            for name in ("initial_delay", "period", "timeout"):
                patch.setenv(f"RAY_health_check_{name}_ms", "500")
            patch.setenv("RAY_health_check_failure_threshold", "3")
            reread_token()
            directory = make_ray_folder(patch)
            node = {"include_dashboard": False, "object_store_memory": 80 << 20, "num_cpus": 2}
            cluster = Cluster(
                initialize_head=True, head_node_args={**node, "temp_dir": directory, "labels": {"zone": "a"}}
            )
            try:
                cluster.add_node(**node, labels={"zone": "b"})
                held = RayCluster(cluster.address, 0)
                yield cluster
                held.close()
            finally:
                ray.shutdown()
                cluster.shutdown()
                shutil.rmtree(directory, ignore_errors=True)
        reread_token()

    @pytest.fixture
    def settings(self, cluster: Any) -> ClusterSettings:
        return ClusterSettings(ray=cluster.address, start_timeout_s=60)

    def test_stages_run_on_the_nodes_they_name_and_give_them_back(self, settings: ClusterSettings) -> None:
        stages = (StageRequest(1, node="zone=b"), StageRequest(1, node="zone=a"))
        for _ in range(2):  # the second time right after the first, with cores that Ray may still count as taken
            with start(*stages, settings=settings) as formation:
                assert answers(formation)
                [group] = live_groups()
                zones = {entry["NodeID"]: entry["Labels"]["zone"] for entry in ray.nodes()}
                assert [zones[node_id] for _, node_id in sorted(group["bundles_to_node_id"].items())] == ["b", "a"]
            assert not live_groups()

    @pytest.mark.alone
    def test_a_stage_that_fits_on_no_node_is_refused_within_seconds(self, settings: ClusterSettings) -> None:
        started = time.monotonic()
        with pytest.raises(PlacementError, match="stage 0 needs 3 ranks on one node") as refused:
            start(3, settings=settings)
        assert time.monotonic() - started < 5
        assert str(refused.value).count("CPU: 3 needed, 2 free of 2") == 2
        assert not live_groups()

    def test_cores_that_another_formation_holds_are_refused_within_seconds(self, settings: ClusterSettings) -> None:
        wide = ClusterSettings(ray=settings.ray, cpus_per_rank=2)
        with start(1, 1, settings=wide) as formation:
            started = time.monotonic()
            with pytest.raises(PlacementError, match="free what other work on the cluster holds"):
                start(1, settings=settings)
            assert time.monotonic() - started < 15
            assert answers(formation)

    def test_ranks_on_a_lost_node_are_named(self, cluster: Any, settings: ClusterSettings) -> None:
        lost = cluster.add_node(num_cpus=1, object_store_memory=80 << 20, labels={"zone": "c"})
        with start(StageRequest(1, node="zone=a"), StageRequest(1, node="zone=c"), settings=settings) as formation:
            cluster.remove_node(lost, allow_graceful=False)
            error = failure(formation)
        assert error.rank == 1
        assert "rank 1 (replica 0, stage 1, tensor rank 0) on node" in str(error)
        assert not live_groups()


def test_a_cluster_that_does_not_answer_is_an_error_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(PhalanxError, match=r"nothing answers at cluster\.ray: 127\.0\.0\.1:1 .*ray start --head"):
        RayHost(ClusterSettings(ray="127.0.0.1:1"), 1)
    assert time.monotonic() - started < 10


def test_without_ray_the_error_says_how_to_get_it_and_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PhalanxError, match=r"pip install 'phalanx\[ray\]'.*cluster\.ray: none"):
        RayHost(SETTINGS, 1)
