"""The connection of this process to Ray: a private one on this machine, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phalanx.errors import PhalanxError, PlacementError
from phalanx.launcher.placement import Node

OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; nothing of ours passes through it
CONNECT_TIMEOUT_S = 5.0  # for the first word with a cluster's head; Ray itself would try for a minute
SLOT = "phalanx_rank"  # stands for a core where ranks may share cores: in a private Ray
SLOTS = 100_000.0

_lock = threading.Lock()  # Ray is one a process, so is what says how many hosts use the one we started
_private: _PrivateRay | None = None
_joined = 0


class RayCluster:
    """A use of Ray by one host. Ray itself ends with the last use, if Phalanx started it."""

    def __init__(self, mode: str, num_ranks: int) -> None:
        """Connects.

        mode: `local`, `auto` or `host:port`, as `ClusterSettings.ray`. A process that is connected to Ray already, such as
        an actor, stays with that. num_ranks: workers that a private Ray starts at once.
        Raises PhalanxError where Ray is not installed or not to be reached.
        """
        if importlib.util.find_spec("ray") is None:
            raise PhalanxError(
                f"cluster.ray: {mode} needs Ray, which is not installed; "
                "install it with `pip install 'phalanx[ray]'`, or run on this machine only with cluster.ray: none"
            )
        started = time.perf_counter()
        self._open = True
        self._is_private = _join(mode, num_ranks)
        self.connect_s = time.perf_counter() - started

    @property
    def is_private(self) -> bool:
        """Whether this is a Ray of our own, where any number of ranks may share the cores."""
        return self._is_private

    @property
    def address(self) -> str:
        """Address of this machine that the other nodes can reach."""
        import ray

        return "127.0.0.1" if self.is_private else str(ray.util.get_node_ip_address())

    def needs(self, rank_needs: Mapping[str, float]) -> dict[str, float]:
        """What a rank takes here: in a private Ray a slot instead of cores."""
        needs = {name: amount for name, amount in rank_needs.items() if amount > 0}
        if self.is_private or not needs:
            needs.pop("CPU", None)
            needs[SLOT] = 1.0
        return needs

    def nodes(self) -> list[Node]:
        """The live nodes and what is free on them now. Ray's figures trail the truth by about a tenth of a second."""
        import ray
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return [_node(entry, free.get(entry["NodeID"], {})) for entry in ray.nodes() if entry["Alive"]]

    def close(self) -> None:
        """Ends this use of Ray. Idempotent."""
        if self._open:
            self._open = False
            _leave()


class _PrivateRay:
    """A Ray of this process's own, on this machine only.

    It has a token and a temporary directory of its own and leaves neither behind. By default Ray would write its token
    into the home directory, after which every other cluster started by this user would demand it.
    """

    def __init__(self, num_ranks: int) -> None:
        self._environment: dict[str, str | None] = {}
        # Sockets lie in it, and the path of a socket may have no more than 107 bytes.
        parent = "/tmp" if len(tempfile.gettempdir()) > 20 else None
        self._directory = Path(tempfile.mkdtemp(prefix="phalanx-", dir=parent))
        if "RAY_AUTH_MODE" not in os.environ:
            self._set("RAY_AUTH_MODE", "token")
            self._set("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if "RAY_USAGE_STATS_ENABLED" not in os.environ:
            self._set("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray

            _forget_token()
            with _own_signals():
                ray.init(
                    address="local",
                    # As many as ranks, for Ray starts a worker a core at once.
                    num_cpus=num_ranks,
                    resources={SLOT: SLOTS},
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(self._directory),
                )
        except BaseException:
            self.close()
            raise

    def _set(self, name: str, value: str) -> None:
        self._environment[name] = os.environ.get(name)
        os.environ[name] = value

    def close(self) -> None:
        import ray

        with _own_signals():
            ray.shutdown()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget_token()
        shutil.rmtree(self._directory, ignore_errors=True)


class _JoinedRay:
    """A cluster that this process joined as a driver."""

    def __init__(self, address: str) -> None:
        import ray

        with _own_signals():
            ray.init(address=address, log_to_driver=False, configure_logging=False)

    def close(self) -> None:
        import ray

        with _own_signals():
            ray.shutdown()
"""
"""
