from __future__ import annotations

from pathlib import Path

import pytest
from tests.launcher.machines import lay_machine

from phalanx.launcher.topology import Core, read_topology, spans


def test_a_small_machine_has_a_core_a_thread(tmp_path: Path) -> None:
    topology = read_topology({0, 1}, lay_machine(tmp_path))
    assert topology.cores == (Core((0,), 0), Core((1,), 0))
    assert topology.num_usable == 2


def test_hardware_threads_of_a_core_belong_together(tmp_path: Path) -> None:
    topology = read_topology(range(256), lay_machine(tmp_path, nodes=2, cores_per_node=64, threads=2))
    assert len(topology.cores) == topology.num_usable == 128
    assert topology.cores[0] == Core((0, 128), 0)
    assert topology.cores[127] == Core((127, 255), 1)
    assert len(topology.cpus) == 256


def test_cores_know_their_memory_node(tmp_path: Path) -> None:
    topology = read_topology(range(16), lay_machine(tmp_path, nodes=4, cores_per_node=4))
    assert [core.node for core in topology.cores] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_of_a_containers_odd_subset_only_what_is_allowed_counts(tmp_path: Path) -> None:
    topology = read_topology({1, 3, 7}, lay_machine(tmp_path, cores_per_node=4, threads=2))
    assert topology.cores == (Core((1,), 0, whole=False), Core((3, 7), 0))


def test_a_system_that_says_nothing_has_a_core_a_thread(tmp_path: Path) -> None:
    assert read_topology({2, 5}, tmp_path).cores == (Core((2,), 0), Core((5,), 0))


@pytest.mark.parametrize(
    ("files", "quota", "usable"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5, 1),
        ({"cpu.max": "50000 100000\n"}, 0.5, 1),
        ({"cpu.max": "max 100000\n"}, None, 4),
        ({"cpu.max": "900000 100000\n"}, 9.0, 4),
        ({}, None, 4),
    ],
)
def test_a_limit_of_time_is_a_limit_of_threads(
    tmp_path: Path, files: dict[str, str], quota: float | None, usable: int
) -> None:
    root = lay_machine(tmp_path, cores_per_node=4)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/pod/box\n")
    (root / "sys/fs/cgroup/pod/box").mkdir(parents=True)
    for name, text in files.items():
        (root / "sys/fs/cgroup/pod" / name).write_text(text)
    topology = read_topology(range(4), root)
    assert (topology.quota, topology.num_usable) == (quota, usable)


def test_a_limit_of_time_by_older_control_groups(tmp_path: Path) -> None:
    root = lay_machine(tmp_path, cores_per_node=4)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("3:cpu,cpuacct:/box\n2:memory:/box\n")
    folder = root / "sys/fs/cgroup/cpu/box"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    (folder.parent / "cpu.cfs_quota_us").write_text("-1\n")
    (folder.parent / "cpu.cfs_period_us").write_text("100000\n")
    assert read_topology(range(4), root).quota == 2.0


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 3], "0-3"), ([8, 0, 1, 5, 6], "0-1,5-6,8")]
)
def test_numbers_are_written_as_the_system_does(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text
