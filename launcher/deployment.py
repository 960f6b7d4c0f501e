"""Named deployments: an `AsyncEngine` in a detached Ray actor, that other programs find by its name."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from phalanx.errors import PhalanxError, PlacementError, RankFailedError, RequestError
from phalanx.launcher.config import Config, load_config
from phalanx.launcher.ray_cluster import RayCluster

if TYPE_CHECKING:
    from phalanx.engine.request import Delta, RequestOutput
    from phalanx.engine.sampling_params import SamplingParams
    from phalanx.engine.stats import EngineStats
    from phalanx.launcher.async_engine import AsyncEngine
    from phalanx.launcher.served import Prompt

NAMESPACE = "phalanx"
"""The Ray namespace of all deployments: `ray.init(namespace="phalanx")`, then `ray.get_actor(NAME)`."""

MAX_CALLS = 4096  # at once; those beyond wait in Ray, `status` among them
STOP_S = 30.0  # for a deployment to end its ranks; then it is killed, and they with it


class Deployment:
    """The actor: an `AsyncEngine` with the interface of one. Calls run together, in one batch."""

    def __init__(self, config: bytes) -> None:
        self._config = msgspec.json.decode(config)
        self._engine: AsyncEngine | None = None
        self._since = time.time()
        self._failure: str | None = None

    async def start(self) -> dict[str, Any]:
        """Starts the ranks; returns the first status. Raises PhalanxError, with the message of what went wrong."""
        from phalanx.launcher.async_engine import AsyncEngine

        try:
            self._engine = await asyncio.to_thread(AsyncEngine.from_config, load_config(self._config))
        except Exception as error:
            self._failure = str(error)
            if isinstance(error, PhalanxError):  # those with parts of their own do not cross processes whole
                raise PhalanxError(str(error)) from None
            raise
        return await self.status()

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """As `AsyncEngine.generate`."""
        with _as_seen_outside():
            return await self._running().generate(prompts, params, request_id=request_id, priority=priority)

    async def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta | RequestOutput, None]:
        """As `AsyncEngine.stream`; call it with `.options(num_returns="streaming")`. A caller that stops listening says
        so with `abort`.
        """
        with _as_seen_outside():
            async for event in self._running().stream(prompts, params, request_id=request_id, priority=priority):
                yield event

    async def abort(self, request_id: str) -> None:
        """As `AsyncEngine.abort`."""
        await self._running().abort(request_id)

    async def stats(self) -> EngineStats:
        """As `AsyncEngine.stats`."""
        return await self._running().stats()

    async def status(self) -> dict[str, Any]:
        """Plain data: `state` (starting, running, failed), `node`, `uptime_s`, `failure`; once it runs, `model`,
        `layout`, `ranks`, `startup_s`, and `replicas`, the figures of each as `EngineStats` has them.
        """
        engine = self._engine
        failure = self._failure or (engine and engine.failure)
        status: dict[str, Any] = {
            "state": "failed" if failure else "starting" if engine is None else "running",
            "node": socket.gethostname(),
            "uptime_s": time.time() - self._since,
            "failure": None if failure is None else str(failure),
        }
        if engine is not None:
            startup = engine.startup
            status["model"] = engine.config.model.path
            status["layout"] = str(engine.plan.layout)
            status["ranks"] = [{"rank": r.rank, "node": r.node, "pid": r.pid} for r in startup.ranks]
            status["startup_s"] = dict(startup.startup_s)
            status["replicas"] = [asdict(stats) for stats in engine.replica_stats()]
        return status

    async def stop(self) -> None:
        """Ends the ranks. The caller then ends the actor."""
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
            self._engine = None

    def _running(self) -> AsyncEngine:
        if self._engine is None:
            raise PhalanxError("this deployment is not running; see `phalanx status`")
        return self._engine


@contextmanager
def _as_seen_outside() -> Iterator[None]:
    """Errors with parts of their own do not cross processes whole: they leave as what they say."""
    try:
        yield
    except RankFailedError as error:
        raise PhalanxError(str(error)) from None


def launch(
    source: str | Path | Mapping[str, Any], name: str, *, overrides: Sequence[str] = (), wait: bool = True
) -> Any:
    """Deploys a configuration under a name and returns the actor's handle.

    The actor is detached: it goes on when this program ends, for as long as the Ray cluster runs. A configuration with
    `cluster.ray: local` joins the cluster that runs on this machine; one must run already (`ray start --head`), since
    a Ray of this program's own would end with it. wait: until the ranks are ready.

    Raises ConfigError for a bad configuration, PlacementError where the name is taken, PhalanxError where Ray is not
    running or the ranks do not start; then nothing is left behind.
    """
    config = _for_cluster(load_config(source, overrides))
    cluster = RayCluster(config.cluster.ray, config.parallel.num_ranks)  # stays open, for the handle to work
    try:
        return _deploy(config, name, wait)
    except BaseException:
        cluster.close()
        raise


def _deploy(config: Config, name: str, wait: bool) -> Any:
    import ray

    if name in deployments():
        raise PlacementError(
            f"a deployment {name!r} runs already; stop it with `phalanx stop {name}` or choose another name"
        )
    actor = (
        ray.remote(Deployment)
        .options(name=name, namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_concurrency=MAX_CALLS)
        .remote(msgspec.json.encode(config.model_dump(mode="json")))
    )
    if wait:
        try:
            ray.get(actor.start.remote())
        except BaseException as error:
            _end(actor)
            raise _own(error) from None
    else:
        actor.start.remote()
    return actor


def deployments() -> list[str]:
    """Names of the deployments on the cluster this process is connected to."""
    import ray

    return sorted(each["name"] for each in ray.util.list_named_actors(True) if each["namespace"] == NAMESPACE)


def find(name: str) -> Any:
    """The handle of a deployment. Raises PhalanxError, with the names there are, where there is none of that name."""
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        running = ", ".join(deployments()) or "none"
        raise PhalanxError(f"there is no deployment {name!r}; running: {running}") from None


def status(name: str) -> dict[str, Any]:
    """What a deployment says of itself; see `Deployment.status`."""
    import ray

    try:
        answer: dict[str, Any] = ray.get(find(name).status.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError) as error:
        return {"state": "unreachable", "failure": str(error)}
    return answer


def stop(name: str) -> None:
    """Ends a deployment and its ranks, and returns when its name is free."""
    import ray

    actor = find(name)
    try:
        ray.get(actor.stop.remote(), timeout=STOP_S)
    except (ray.exceptions.RayError, TimeoutError):
        pass  # it is killed below; its ranks are its actors and end with it
    finally:
        _end(actor)


def _end(actor: Any) -> None:
    import ray

    ray.kill(actor, no_restart=True)


def _own(error: BaseException) -> BaseException:
    """The error that was raised inside the actor, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, RequestError | PhalanxError):
        return cause
    return error


def _for_cluster(config: Config) -> Config:
    """`config` for ranks on a cluster that outlives this program.

    What a configuration for this machine leaves open is decided as for this machine.
    """
    if config.cluster.ray == "none":
        raise PhalanxError("a deployment needs Ray: set cluster.ray to auto or host:port")
    if config.cluster.ray != "local":
        return config
    from phalanx.launcher.served import checked_plan
    from phalanx.models.resolve import resolve_model

    plan = checked_plan(config, resolve_model(config.model.path, revision=config.model.revision))
    changes = {
        "ray": "auto",
        "device": plan.device,
        "cpus_per_rank": plan.cpus_per_rank,
        "gpus_per_rank": plan.gpus_per_rank,
    }
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=changes)})
