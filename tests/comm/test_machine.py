from __future__ import annotations

from phalanx.comm.machine import Seat, machines_of, own_seat, sharing_machines, why_apart

HERE = Seat("a", boot="1", processes="p", network="n", user="7")


def test_processes_of_one_machine_are_not_apart() -> None:
    assert own_seat() == own_seat()
    assert why_apart([own_seat(), own_seat()]) == ""


def test_ranks_on_several_machines_are_told_with_their_hosts() -> None:
    there = HERE._replace(host="b", boot="2")
    assert why_apart([HERE, there, HERE]) == "ranks on several machines: 0, 2 on a; 1 on b"


def test_ranks_of_one_machine_that_do_not_see_each_other_are_apart() -> None:
    for name, what in (
        ("processes", "in several process namespaces (containers)"),
        ("network", "in several network namespaces"),
        ("user", "of several users"),
    ):
        assert why_apart([HERE, HERE._replace(**{name: "x"})]) == f"ranks {what}: 0 on a; 1 on a"


def test_a_rank_that_cannot_share_memory_is_named_with_its_reason() -> None:
    assert why_apart([HERE, HERE._replace(obstacle="no pidfd_open")]) == "rank 1: no pidfd_open"


def test_machines_are_numbered_in_the_order_of_ranks_and_containers_count_as_such() -> None:
    there = HERE._replace(host="b", boot="2")
    container = HERE._replace(processes="q")
    other_user = HERE._replace(user="8", obstacle="no pidfd_open")
    assert machines_of([HERE, there, other_user, container, there]) == (0, 1, 0, 2, 1)


def test_where_ranks_of_one_machine_cannot_share_memory_none_is_said_to_be_shared() -> None:
    there = HERE._replace(host="b", boot="2")
    assert sharing_machines([HERE, there, HERE]) == (0, 1, 0)
    assert sharing_machines([HERE, there, HERE._replace(user="8")]) == ()
    assert sharing_machines([HERE, there, HERE._replace(obstacle="no pidfd_open")]) == ()
