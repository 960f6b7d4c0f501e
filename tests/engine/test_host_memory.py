from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from phalanx.engine.host_memory import HostMemory, host_memory

GIB = 2**30
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
UNLIMITED_V1 = 2**63 - 4096


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(membership: str = "0::/\n", total: int = 16 * GIB, available: int = 12 * GIB) -> dict[str, str]:
    info = f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\nHugePages_Total: 0\n"
    return {"proc/meminfo": info, "proc/self/cgroup": membership}


def group_v1(folder: str, limit: int, usage: int, file_bytes: int = 0) -> dict[str, str]:
    stat = f"cache 7\ninactive_file 1\ntotal_inactive_file {file_bytes}\ntotal_active_file 0\n"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": stat,
    }


def group_v2(folder: str, limit: int | str, usage: int, file_bytes: int = 0) -> dict[str, str]:
    stat = f"anon {usage - file_bytes}\nfile {file_bytes}\ninactive_file 0\nactive_file {file_bytes}\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": stat,
    }


def test_this_machine_has_what_psutil_says_unless_it_is_a_container() -> None:
    memory = host_memory()
    if memory.total_bytes is None or memory.free_bytes is None:
        pytest.skip("needs Linux")
    assert 0 < memory.free_bytes <= memory.total_bytes <= psutil.virtual_memory().total


def test_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    assert host_memory(lay(tmp_path, machine(""))) == HostMemory(16 * GIB, 12 * GIB)


def test_a_system_that_says_nothing_is_unknown(tmp_path: Path) -> None:
    assert host_memory(tmp_path) == HostMemory(None, None)


def test_a_container_of_version_2_has_its_limit_and_what_it_has_not_used(tmp_path: Path) -> None:
    lay(tmp_path, machine() | group_v2(V2, 4 * GIB, 3 * GIB))
    assert host_memory(tmp_path) == HostMemory(4 * GIB, GIB)


def test_a_container_of_version_1_has_its_limit_and_what_it_has_not_used(tmp_path: Path) -> None:
    lay(tmp_path, machine("5:cpu:/\n4:memory:/\n") | group_v1(V1, 4 * GIB, 3 * GIB))
    assert host_memory(tmp_path) == HostMemory(4 * GIB, GIB)


@pytest.mark.parametrize(
    "group", [group_v1(V1, 4 * GIB, 3 * GIB, 2 * GIB), group_v2(V2, 4 * GIB, 3 * GIB, 2 * GIB)], ids=["v1", "v2"]
)
def test_cached_files_count_as_free(tmp_path: Path, group: dict[str, str]) -> None:
    lay(tmp_path, machine("4:memory:/\n0::/\n") | group)
    assert host_memory(tmp_path).free_bytes == 3 * GIB


def test_the_limit_of_every_enclosing_group_holds(tmp_path: Path) -> None:
    inner, outer = f"{V2}/user.slice/job", f"{V2}/user.slice"
    groups = group_v2(inner, "max", GIB) | group_v2(outer, 6 * GIB, 5 * GIB)
    lay(tmp_path, machine("0::/user.slice/job\n") | groups)
    assert host_memory(tmp_path) == HostMemory(6 * GIB, GIB)


def test_a_container_that_sees_its_own_group_as_the_top_is_held_by_it(tmp_path: Path) -> None:
    lay(tmp_path, machine("4:memory:/docker/0123abcd\n") | group_v1(V1, 4 * GIB, GIB))
    assert host_memory(tmp_path) == HostMemory(4 * GIB, 3 * GIB)


def test_a_limit_that_is_none_bounds_nothing(tmp_path: Path) -> None:
    lay(tmp_path, machine("4:memory:/\n") | group_v1(V1, UNLIMITED_V1, 3 * GIB))
    assert host_memory(tmp_path) == HostMemory(16 * GIB, 12 * GIB)


def test_a_group_that_uses_all_of_its_limit_has_nothing_free(tmp_path: Path) -> None:
    lay(tmp_path, machine() | group_v2(V2, GIB, 2 * GIB))
    assert host_memory(tmp_path).free_bytes == 0
