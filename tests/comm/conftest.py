"""The pool of rank processes, and its groups of each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.comm.rank_pool import RankPool

from phalanx.comm import host_store
from phalanx.comm.create import _backends


class BackendPool:
    """The pool, with groups of one backend where a test names none."""

    def __init__(self, pool: RankPool, backend: str) -> None:
        self._pool = pool
        self.backend = backend

    def run(self, function: Callable[..., object], size: int, **options: Any) -> list[Any]:
        return self._pool.run(function, size, **{**self._defaults(size), **options})

    def outcomes(self, function: Callable[..., object], size: int, **options: Any) -> list[dict[str, Any]]:
        return self._pool.outcomes(function, size, **{**self._defaults(size), **options})

    def _defaults(self, size: int) -> dict[str, Any]:
        machines = [f"machine {'ab'[rank % 2]}" for rank in range(size)] if self.backend == "hierarchical" else None
        return {"backend": self.backend, "machines": machines}


@pytest.fixture(params=["shm", "shm-torch", "gloo", "hierarchical"])
def any_pool(pool: RankPool, request: pytest.FixtureRequest) -> BackendPool:
    """The pool once for each backend of the CPU; with the hierarchical one every second rank takes itself to be on
    another machine.
    """
    return BackendPool(pool, checked(request.param))


@pytest.fixture(params=["shm", "shm-torch", "gloo"])
def flat_pool(pool: RankPool, request: pytest.FixtureRequest) -> BackendPool:
    """The same without the hierarchical backend, which sums in two steps."""
    return BackendPool(pool, checked(request.param))


@pytest.fixture(params=["shm", "shm-torch"])
def shm_pool(pool: RankPool, request: pytest.FixtureRequest) -> BackendPool:
    """The pool with shared memory: by the native library where it is there, and by torch alone."""
    return BackendPool(pool, checked(request.param))


def checked(backend: str) -> str:
    probe = _backends[backend].probe("cpu", 2)
    if not probe.usable:
        pytest.skip(f"needs the backend {backend}: {probe.reason}")
    return backend


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    store, rendezvous = host_store("127.0.0.1")
    ranks = RankPool(rendezvous)
    try:
        ranks.start(4)
        yield ranks
    finally:
        ranks.close()
        del store
