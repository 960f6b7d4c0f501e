"""What a rank's process does around `run_rank`: threads before torch, and an account of a failure that survives it."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from phalanx.engine.held_cores import HeldCores
from phalanx.errors import CommError
from phalanx.launcher.pinning import MachineShare, even_threads, take_cores
from phalanx.launcher.topology import read_topology

MAX_MESSAGE, MAX_TRACEBACK = 2_000, 16_000  # characters kept; together they fit in a pipe that nobody reads yet


# How long threads of torch's OpenMP (libgomp) spin behind a parallel region, in pauses: much less than by default, when
# the native operators' threads have to share their cores. With an operator of each in turn on two cores, the native one
# takes 72 us and not 92 (alone 70), and torch's 33 and not 41.
OPENMP_SPINS = ("GOMP_SPINCOUNT", "500")


class RankReport(msgspec.Struct, frozen=True, array_like=True):
    """How a rank ended: None as message where it returned. symptom: whether its exception blames another rank."""

    message: str | None = None
    traceback: str = ""
    symptom: bool = False


class Threads(NamedTuple):
    """num_threads: that the rank computes with. cores: that they are held to."""

    num_threads: int
    cores: HeldCores


def settle_threads(num_threads: int, share: MachineShare, environment: Mapping[str, str] | None = None) -> Threads:
    """Holds the process to its cores, and sets the thread counts that numeric libraries read when they are first
    imported, and other variables.

    num_threads: no more are used than the process may run at once; 0 for its share of the cores.
    """
    topology = read_topology()
    count = max(1, min(num_threads, len(topology.cpus))) if num_threads else even_threads(share, topology)
    cores = take_cores(share, count, topology)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    os.environ.setdefault(*OPENMP_SPINS)
    os.environ.update(environment or {})
    return Threads(count, cores)


def load_target(target: str) -> Callable[[Any], None]:
    """The function named by `module:function`."""
    module, _, function = target.partition(":")
    loaded: Callable[[Any], None] = getattr(importlib.import_module(module), function)
    return loaded


def run_target(target: str, spec: bytes, threads: Threads) -> RankReport:
    """Runs a rank from its encoded specification to its end; whatever exception ends it is in the report."""
    try:
        # First, and not at the top: it brings torch, which reads the thread counts when it is imported, and it says
        # how long that took.
        function = load_target(target)
        from phalanx.engine.messages import RankSpec

        decoded = msgspec.msgpack.decode(spec, type=RankSpec)
        function(replace(decoded, num_threads=threads.num_threads, cores=threads.cores))
    except Exception as error:
        return failure_report(error)
    return RankReport()


def failure_report(error: BaseException) -> RankReport:
    """The account of an exception, with its traceback."""
    text = "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]
    message = traceback.format_exception_only(error)[-1].strip()
    return RankReport(message[:MAX_MESSAGE], text, isinstance(error, CommError))
