"""Every kernel for GPUs compiled ahead of time, as its launcher would launch it: no spills, no more shared memory than
there is, and for Hopper the instructions that it says it has.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import cast

import pytest

from phalanx.kernels.triton_gpu import find_triton

if find_triton().operators is None:
    pytest.skip(f"needs Triton: {find_triton().told}", allow_module_level=True)

from triton.runtime.jit import JITFunction

from phalanx.kernels.gpu import ahead_of_time
from phalanx.kernels.gpu.ahead_of_time import Case, Compiled

CASES = list(ahead_of_time.examples())


@pytest.fixture(scope="module")
def making(request: pytest.FixtureRequest) -> dict[Case, Future[tuple[Compiled, ...]]]:
    """The cases that tests were chosen for, which are compiled beside each other."""
    chosen = [
        cast("Case", item.callspec.params["case"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_it_compiles_without_spills.__name__
    ]
    return dict(zip(chosen, ahead_of_time.compiled(chosen), strict=True))


@pytest.mark.parametrize("case", CASES, ids=[f"{name}-{example.name}-sm_{arch}" for name, example, arch in CASES])
def test_it_compiles_without_spills(case: Case, making: dict[Case, Future[tuple[Compiled, ...]]]) -> None:
    made = making[case].result()
    assert made
    for kernel in made:
        assert kernel.faults(case.example.instructions) == [], kernel


def test_every_kernel_is_in_an_example() -> None:
    """A kernel ends in `_kernel`; other jitted functions are parts of some."""
    launched = {launch.kernel.fn for _, example, arch in CASES for launch in ahead_of_time.launches_of(example, arch)}
    kernels = {
        value.fn
        for module in ahead_of_time.kernel_modules().values()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels <= launched


def test_a_kernel_that_takes_too_much_is_found_out() -> None:
    fine = Compiled("rms_norm", "", "", 90, 128, 0, 100_000, 4, ("wgmma",))
    assert fine.faults(("wgmma",)) == []
    assert fine.occupancy == 2 * 4 / 64  # by shared memory
    assert "spills 8 bytes" in replace(fine, stack_bytes=8).faults()[0]
    assert "shared memory" in replace(fine, shared_bytes=232_449).faults()[0]
    assert "no tma" in fine.faults(("wgmma", "tma"))[0]
