"""The connection of this process to Ray: a private one on this machine, or a cluster that runs already."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.util
import inspect
import logging
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

from phalanx.errors import PhalanxError
from phalanx.launcher.placement import Node

OBJECT_STORE_BYTES = 80 << 20  # Ray's least is 75 MiB; nothing of ours passes through it
CONNECT_TIMEOUT_S = 5.0  # for the first word with a cluster's head; Ray itself would try for a minute
SLOT = "phalanx_rank"  # stands for a core where ranks may share cores: in a private Ray
SLOTS = 100_000.0
MAX_TEMP_PATH = 20
TEMP_PREFIX = "phalanx-ray-"

logger = logging.getLogger(__name__)


class RayCluster:
    """A use of Ray by one host. Ray itself ends with the last use, if Phalanx started it."""

    def __init__(self, mode: str, num_ranks: int) -> None:
        """Connects.

        mode: `local`, `auto` or `host:port`, as `ClusterSettings.ray`. A process that is connected to Ray already, such
        as an actor, stays with that. num_ranks: workers that a private Ray starts at once.
        Raises PhalanxError where Ray is not installed or not to be reached.
        """
        if importlib.util.find_spec("ray") is None:
            raise PhalanxError(
                f"cluster.ray: {mode} needs Ray, which is not installed; "
                "install it with `pip install 'phalanx[ray]'`, or run on this machine only with cluster.ray: none"
            )
        started = time.perf_counter()
        self._session: _Session | None = _join(mode, num_ranks)
        self._is_private = self._session.is_private
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
        session, self._session = self._session, None
        if session is not None:
            _leave(session)


class _Session:
    """This process's connection to Ray, and how many hosts use it. This one was made by others and is left to them."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.num_users = 0

    @property
    def is_private(self) -> bool:
        """Whether this is a Ray that Phalanx started, here or in the program whose actor this process is."""
        import ray

        return SLOT in ray.cluster_resources()

    def close(self) -> None:
        """Undoes what making it did."""


class _JoinedSession(_Session):
    """A cluster that this process joins as a driver."""

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        import ray

        if mode != "auto":
            _reach(mode)
        self._handler = _SignalHandlerKept()
        try:
            ray.init(address=mode, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise PhalanxError(_join_failure(mode, error)) from error
        finally:
            self._handler.started()
        self._standard_output = _StandardOutputKept()

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._handler.undo()
        self._standard_output.undo()


class _PrivateSession(_Session):
    """A Ray of this process's own, on this machine only.

    It has a token and a temporary directory of its own and leaves neither behind. By default Ray would write its token
    into the home directory, after which every cluster that this user starts later would demand it.
    """

    def __init__(self, mode: str, num_ranks: int) -> None:
        super().__init__(mode)
        self._replaced: dict[str, str | None] = {}
        self._standard_output: _StandardOutputKept | None = None
        self._handler = _SignalHandlerKept()
        # Sockets lie in it, and the path of a socket may have no more than 107 bytes.
        parent = Path("/tmp" if len(tempfile.gettempdir()) > MAX_TEMP_PATH else tempfile.gettempdir())
        _sweep(parent)
        self._directory = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=parent))
        self._lock = os.open(self._directory / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        if "RAY_AUTH_MODE" not in os.environ:
            self._set("RAY_AUTH_MODE", "token")
            self._set("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if "RAY_USAGE_STATS_ENABLED" not in os.environ:
            self._set("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray

            reread_token()
            with _without_monitors():
                ray.init(
                    address="local",
                    num_cpus=num_ranks,  # Ray starts a worker a core at once: just those that ranks will take
                    resources={SLOT: SLOTS},
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=str(self._directory),
                )
            self._handler.started()
            self._standard_output = _StandardOutputKept()
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError | ConnectionError | OSError):
                raise PhalanxError(
                    f"Ray could not be started on this machine: {_first_line(error)}; see whether a firewall keeps its "
                    "processes from each other, or run without Ray with cluster.ray: none"
                ) from error
            raise

    def _set(self, name: str, value: str) -> None:
        self._replaced[name] = os.environ.get(name)
        os.environ[name] = value

    def close(self) -> None:
        import ray

        ray.shutdown()
        self._handler.undo()
        if self._standard_output is not None:
            self._standard_output.undo()
        for name, value in self._replaced.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        reread_token()
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def _without_monitors() -> Iterator[None]:
    """`ray start` can leave out the processes that scale a cluster and that forward logs, `ray.init` cannot: each takes
    0.4 s of a core while the ranks want to start. They are left out where this version of Ray knows how.
    """
    from ray._private import parameter

    known = parameter.RayParams
    wanted = {"no_monitor": True, "include_log_monitor": False}
    if wanted.keys() <= inspect.signature(known).parameters.keys():
        parameter.RayParams = functools.partial(known, **wanted)
    try:
        yield
    finally:
        parameter.RayParams = known


def _sweep(parent: Path) -> None:
    """Removes what a process that was killed left in `parent`: directories whose lock nobody holds any more."""
    for lock in parent.glob(f"{TEMP_PREFIX}*/lock"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


_lock = threading.Lock()
_session: _Session | None = None  # one a process, because Ray is


def _join(mode: str, num_ranks: int) -> _Session:
    global _session  # noqa: PLW0603 - mirrors Ray's own state, which is the process's
    import ray

    with _lock:
        if _session is not None and not ray.is_initialized():  # shut down behind our back
            _session.close()
            _session = None
        if _session is None:
            if ray.is_initialized():
                _session = _Session(mode)
            elif mode == "local":
                _session = _PrivateSession(mode, num_ranks)
            else:
                _session = _JoinedSession(mode)
        elif type(_session) is not _Session and mode != _session.mode:
            raise PhalanxError(
                f"cluster.ray: {mode} cannot be had while this process uses Ray with cluster.ray: {_session.mode}; "
                "close that first, or use another process"
            )
        _session.num_users += 1
        return _session


def _leave(session: _Session) -> None:
    global _session  # noqa: PLW0603 - as above
    with _lock:
        session.num_users -= 1
        if session.num_users == 0 and session is _session:
            _session = None
            session.close()


def reread_token() -> None:
    """Ray keeps the token and the mode it has once read; makes it read them from the environment again."""
    with contextlib.suppress(AttributeError):  # Ray before tokens
        raylet = importlib.import_module("ray._raylet")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        raylet.Config.initialize("")


class _StandardOutputKept:
    """Sends what Ray would print about dead workers on standard output, whatever its options, to the log.

    Standard output is for results: a line of Ray's between them would break `--json`.
    """

    def __init__(self) -> None:
        from ray._private import worker

        self._worker: Any = worker
        self._printer = getattr(worker, "print_to_stdstream", None)
        if self._printer is not None:
            self._worker.print_to_stdstream = _log_lines

    def undo(self) -> None:
        if self._printer is not None:
            self._worker.print_to_stdstream = self._printer


def _log_lines(data: Mapping[str, Any], **_: object) -> None:
    for line in data["lines"]:
        logger.debug("Ray: %s", line)


class _SignalHandlerKept:
    """Ray replaces the handler of SIGTERM by one that ends the program in order, which is not ours to impose.

    Where the program has a handler of its own it is put back at once; where it has none, Ray's serves until `undo`,
    since a program that simply dies leaves Ray's processes to notice by themselves.
    """

    def __init__(self) -> None:
        self._before = signal.getsignal(signal.SIGTERM)

    def started(self) -> None:
        if self._before is not signal.SIG_DFL:
            self.undo()

    def undo(self) -> None:
        if self._before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before)


def _reach(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise PhalanxError(
            f"nothing answers at cluster.ray: {address} ({error}); start the cluster's head with "
            "`ray start --head --port=PORT` and give that machine's address and port"
        ) from error


def _join_failure(mode: str, error: Exception) -> str:
    what = f"cannot join the Ray cluster of cluster.ray: {mode}: {_first_line(error)}"
    if "token" in str(error).lower():
        remedy = (
            "set RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN here, or RAY_AUTH_MODE=disabled if it has none"
        )
    else:
        remedy = "start one here with `ray start --head`, and `ray start --address=HOST:PORT` on the other machines"
    return f"{what}; {remedy}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _node(entry: Mapping[str, Any], free: Mapping[str, float]) -> Node:
    labels = dict(entry.get("Labels") or {})
    total = {str(name): float(amount) for name, amount in entry["Resources"].items()}
    kinds = (name.removeprefix("accelerator_type:") for name in total if name.startswith("accelerator_type:"))
    accelerator = labels.get("ray.io/accelerator-type") or next(kinds, None)
    return Node(
        entry["NodeID"],
        entry["NodeManagerAddress"],
        entry["NodeManagerHostname"],
        total,
        dict(free),
        accelerator,
        labels,
    )
