"""Phalanx behind Ray Serve, in place of `phalanx serve`: the same routes, in replicas that Ray Serve starts, watches
and replaces. On a Ray cluster, with `ray[serve]` installed:

    serve run phalanx.configs.deploy.ray_serve:build config=configs/demo.yaml

Each replica has an engine and ranks of its own. Requests come through Ray Serve's proxies, at its own host and port
(127.0.0.1:8000 unless told otherwise), not those of the section `serve:`; keys and limits are as that section says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp

from phalanx.launcher.async_engine import AsyncEngine
from phalanx.launcher.config import load_config
from phalanx.serve.app import HttpFront
from phalanx.serve.server import with_bounds

MAX_REQUESTS = 100_000  # at once in a replica: the app itself refuses what is too much, and says when to come again


class Replica:
    """An engine, and the application that `phalanx serve` puts in front of it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Starts the ranks. config: as plain data, for the file need not be where the replica is."""
        self._engine = AsyncEngine.from_config(load_config(config))
        try:
            self._front = HttpFront(self._engine)
        except BaseException:
            self._engine.close()
            raise

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, which Ray Serve sends the requests."""
        return self._front.app

    def check_health(self) -> None:
        """Raises what ended the engine, and Ray Serve replaces the replica, and its ranks with it."""
        if self._engine.failure is not None:
            raise self._engine.failure

    def __del__(self) -> None:
        """Ray Serve calls it once the replica's requests are finished, or their time is over."""
        if hasattr(self, "_front"):
            self._front.close()
            self._engine.close()


def build(args: Mapping[str, str]) -> Any:
    """The Ray Serve application. args: `config`, the path of a YAML file. Raises ConfigError for a bad one."""
    from ray import serve

    config = with_bounds(load_config(args["config"]))
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="phalanx",
        ray_actor_options={"num_cpus": 0},  # as in `phalanx launch`: all cores are the ranks'
        max_ongoing_requests=MAX_REQUESTS,
        graceful_shutdown_timeout_s=config.serve.drain_timeout_s,
    )
    return deployment.bind(config.model_dump(mode="json"))
