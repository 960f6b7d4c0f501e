from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phalanx.engine import device_memory
from phalanx.engine.device_memory import memory_meter
from phalanx.engine.host_memory import HostMemory
from phalanx.engine.kv_budget import num_pages_for, pages_within
from phalanx.errors import PhalanxError

MIB = 2**20


@given(
    free_bytes=st.integers(-(2**40), 2**45),
    share=st.floats(0.01, 1.0),
    bytes_per_page=st.integers(1, 2**30),
)
def test_pages_are_as_many_as_fit_the_share(free_bytes: int, share: float, bytes_per_page: int) -> None:
    num_pages = pages_within(free_bytes, share, bytes_per_page)
    allowed = Fraction(share) * max(0, free_bytes)
    rounding = allowed / 2**50
    assert num_pages * bytes_per_page <= allowed + rounding
    assert (num_pages + 1) * bytes_per_page > allowed - rounding - 1


def test_no_more_pages_are_taken_than_can_be_used() -> None:
    assert num_pages_for(100 * MIB, 0.5, MIB, 1000) == 50
    assert num_pages_for(100 * MIB, 0.5, MIB, 20) == 20


@pytest.mark.parametrize("free_bytes", [-MIB, 0, MIB])
def test_too_little_for_one_page_is_an_error_with_figures(free_bytes: int) -> None:
    with pytest.raises(
        PhalanxError, match=r"engine\.kv_cache_share 0\.9 .* 0 pages of 1048576 bytes.*; what would fit: use more ranks"
    ):
        num_pages_for(free_bytes, 0.9, MIB, 1000)


def test_too_little_for_the_longest_sequence_is_an_error_with_figures() -> None:
    assert num_pages_for(10 * MIB, 1.0, MIB, 1000, least_pages=10) == 10
    with pytest.raises(PhalanxError, match=r"holds 9 pages .* at least 10 are needed, 10 MiB"):
        num_pages_for(10 * MIB - 1, 1.0, MIB, 1000, least_pages=10)


def says(memory: HostMemory) -> Callable[[], HostMemory]:
    return lambda: memory


def test_a_cpu_has_what_the_machine_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "host_memory", says(HostMemory(8 * MIB, 5 * MIB)))
    assert memory_meter(torch.device("cpu")).read().unused_bytes == 5 * MIB


def test_a_system_that_does_not_tell_asks_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "host_memory", says(HostMemory(None, None)))
    with pytest.raises(PhalanxError, match=r"give engine\.kv_cache a size"):
        memory_meter(torch.device("cpu")).read()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_what_is_in_tensors_and_what_was_at_the_peak() -> None:
    device = torch.device("cuda")
    meter = memory_meter(device)
    meter.give_back()
    meter.reset_peak()
    before = meter.read()
    held = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    work = torch.empty(32 * MIB, dtype=torch.uint8, device=device)
    del work  # now cached, and the peak of a step
    after = meter.read()
    assert before.unused_bytes - after.unused_bytes == held.nbytes
    assert after.peak_bytes - before.allocated_bytes == held.nbytes + 32 * MIB
    assert after.outside_bytes == before.outside_bytes
