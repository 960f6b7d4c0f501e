"""Kernels compiled on a machine without a GPU, and what the compiler made of them.

An operator's launcher is called with tensors of device `meta`, its launches are caught, and each is compiled with the
very arguments, constants and options that it would have on the GPU.
"""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, wraps
from types import ModuleType
from typing import Any, NamedTuple

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from phalanx.kernels import gpu
from phalanx.kernels.gpu.example import Example
from phalanx.kernels.gpu.kernel_swap import swapped
from phalanx.kernels.gpu.target import A100, H100, assumed

TARGETS = {80: A100, 90: H100}
SHARED_BYTES = {80: 166_912, 90: 232_448}  # most that a block may have; ptxas takes more without complaint
_SM_SHARED_BYTES = {80: 167_936, 90: 233_472}
_BLOCK_RESERVED_BYTES = 1024  # of shared memory, taken by the driver
_SM_WARPS, _SM_BLOCKS, _SM_REGISTERS = 64, 32, 65_536
_WARP_REGISTERS = 256  # registers are given to a warp in units of this
_WITH_BYTES, _REGISTERS, _STACK_BYTES = 0x04, 0x2F, 0x12  # a form and two attributes of `.nv.info`
_IN_PTX = {"wgmma": "wgmma.mma_async", "tma": "cp.async.bulk.tensor"}


class Case(NamedTuple):
    """An example of an operator, and the architecture (80 for sm_80) that it is to be compiled for."""

    operator: str
    example: Example
    arch: int


class Launch(NamedTuple):
    """A kernel, and what its launcher gave it."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch. stack_bytes: of a thread, for registers that were spilled. occupancy: warps
    that fit on a multiprocessor at once, of the most it can hold. instructions: of `wgmma` and `tma`.
    """

    operator: str
    example: str
    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    instructions: tuple[str, ...]

    @property
    def occupancy(self) -> float:
        registers_of_warp = -(-self.registers * 32 // _WARP_REGISTERS) * _WARP_REGISTERS
        by_registers = _SM_REGISTERS // (registers_of_warp * self.num_warps)
        by_shared = _SM_SHARED_BYTES[self.arch] // (self.shared_bytes + _BLOCK_RESERVED_BYTES)
        blocks = min(by_registers, by_shared, _SM_BLOCKS, _SM_WARPS // self.num_warps)
        return blocks * self.num_warps / _SM_WARPS

    def faults(self, needed: tuple[str, ...] = ()) -> list[str]:
        """What must not be. needed: instructions that there must be on sm_90."""
        faults = []
        if self.stack_bytes:
            faults.append(f"spills {self.stack_bytes} bytes a thread")
        if self.shared_bytes > SHARED_BYTES[self.arch]:
            faults.append(f"takes {self.shared_bytes} bytes of shared memory, {SHARED_BYTES[self.arch]} is the most")
        if self.arch == 90:
            faults += [f"has no {name} instructions" for name in needed if name not in self.instructions]
        return faults


@cache
def kernel_modules() -> dict[str, ModuleType]:
    """The files of the package, by name."""
    names = [info.name for info in pkgutil.iter_modules(gpu.__path__)]
    return {name: importlib.import_module(f"{gpu.__name__}.{name}") for name in names}


def examples() -> Iterator[Case]:
    """All that is to be compiled."""
    for name, module in kernel_modules().items():
        for example in getattr(module, "EXAMPLES", ()):
            for arch in example.archs:
                yield Case(name, example, arch)


def launches_of(example: Example, arch: int) -> list[Launch]:
    """Those that the example makes on a GPU of that architecture; none runs."""
    caught: list[Launch] = []

    class Catcher:
        def __init__(self, kernel: JITFunction) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: caught.append(Launch(self._kernel, args, options))

    with swapped(kernel_modules().values(), Catcher), assumed(TARGETS[arch]):
        example.call()
    return caught


def compiled(cases: Iterable[Case]) -> list[Future[tuple[Compiled, ...]]]:
    """Each launch of each case, compiled by a thread a core: the compiler needs Python's lock for half of its time."""
    # All of them first: while launches are caught, the modules that a compiler reads hold no kernels.
    caught = [(case, launches_of(case.example, case.arch)) for case in cases]
    _parse_in_turns()
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    futures = [pool.submit(_compile_all, case, launches) for case, launches in caught]
    pool.shutdown(wait=False)
    return futures


def _parse_in_turns() -> None:
    """From now on: CPython counts the depth of syntax trees of all threads together, and where two make one at a time
    it may find that it has changed, and raises SystemError (python/cpython issue 106905; seen with 3.11.7).
    """
    parse, turn = ast.parse, threading.Lock()
    if hasattr(parse, "__wrapped__"):
        return

    @wraps(parse)
    def parse_alone(*args: Any, **options: Any) -> Any:
        with turn:
            return parse(*args, **options)

    ast.parse = parse_alone


def _compile_all(case: Case, launches: Sequence[Launch]) -> tuple[Compiled, ...]:
    return tuple(_compile(case.operator, case.example, case.arch, launch) for launch in launches)


def compile_launch(launch: Launch, arch: int) -> CompiledKernel:
    """As `JITFunction.run` does before it launches."""
    kernel = launch.kernel
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    given = {"debug": False, "instrumentation_mode": "", **launch.options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return compile_kernel(source, target=target, options=options.__dict__)


def _compile(operator: str, example: Example, arch: int, launch: Launch) -> Compiled:
    made = compile_launch(launch, arch)
    registers, stack_bytes = resources(made.asm["cubin"])
    found = tuple(name for name, text in _IN_PTX.items() if text in made.asm["ptx"])
    return Compiled(
        operator,
        example.name,
        launch.kernel.fn.__name__.strip("_").removesuffix("_kernel"),
        arch,
        registers,
        stack_bytes,
        made.metadata.shared,
        made.metadata.num_warps,
        found,
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread, which `cuobjdump --dump-resource-usage` takes from the same place: the
    section `.nv.info` of the ELF file. A program less to start for each kernel.
    """
    found = {_REGISTERS: [0], _STACK_BYTES: [0]}
    info, at = _section(cubin, b".nv.info"), 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _WITH_BYTES:  # its value is in the place of the size
            continue
        if attribute in found:
            _, value = struct.unpack_from("<II", info, at)  # of which function, and what
            found[attribute].append(value)
        at += size
    if len(found[_REGISTERS]) == 1:
        raise ValueError("ptxas left no register count in .nv.info; has the format of its files changed?")
    return max(found[_REGISTERS]), max(found[_STACK_BYTES])


def _section(elf: bytes, wanted: bytes) -> bytes:
    """The bytes of the first section of that name in a little-endian ELF64 file; none where there is none."""
    (headers_at,) = struct.unpack_from("<Q", elf, 0x28)
    header_size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, headers_at + index * header_size) for index in range(count)]
    names_at = headers[names_index][4]
    for name_at, *_, at, size in headers:
        start = names_at + name_at
        if elf[start : elf.index(b"\0", start)] == wanted:
            return elf[at : at + size]
    return b""
