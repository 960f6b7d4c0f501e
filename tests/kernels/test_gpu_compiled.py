"""Every kernel for GPUs compiled ahead of time, as its launcher would launch it: no spills, no more shared memory than
there is, and for Hopper the instructions that it says it has.
"""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from phalanx.kernels.triton_gpu import find_triton

if find_triton().operators is None:
    pytest.skip(f"needs Triton: {find_triton().told}", allow_module_level=True)

from triton import knobs
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


def test_registers_and_stack_are_those_that_cuobjdump_tells(tmp_path: Path) -> None:
    """Also of a kernel that spills: its registers are limited to 40."""
    _, example, arch = next(case for case in CASES if case.operator == "prefill_attention" and case.arch == 80)
    ptx = ahead_of_time.compile_launch(ahead_of_time.launches_of(example, arch)[0], arch).asm["ptx"]
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    told = {}
    for most in (255, 40):
        source.write_text(re.sub(r"\.(reqntid|maxntid) [^\n{]*", "", ptx))
        ptxas = [knobs.nvidia.ptxas.path, f"-arch=sm_{arch}", "--maxrregcount", str(most), "-o", cubin, source]
        subprocess.run(ptxas, check=True, timeout=60)
        dump = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        text = subprocess.run(dump, capture_output=True, text=True, check=True, timeout=60).stdout
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
        told[most] = (found["REG"], found["STACK"] + found["LOCAL"])
        assert ahead_of_time.resources(cubin.read_bytes()) == told[most]
    assert told[255][1] == 0 < told[40][1]


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
