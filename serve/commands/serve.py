"""`phalanx serve`: a model behind OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import logging

SWITCH_S = 0.0005
COLLECTION_OBJECTS = 1_000_000  # that are new when a collection does not wait for a quiet moment


def serve(
    config: Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")],
    host: Annotated[str | None, typer.Option("--host", help="Address to listen at, in place of serve.host.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Port to listen at, in place of serve.port.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: parallel.tensor=3. Repeatable."),
    ] = None,
) -> None:
    """Serve the model of CONFIG over HTTP, by OpenAI's protocol, until SIGTERM or Ctrl-C; running requests are finished
    first.
    """
    import gc
    import logging
    import sys
    from contextlib import closing

    from rich.console import Console

    from phalanx.launcher.async_engine import AsyncEngine
    from phalanx.launcher.config import load_config
    from phalanx.launcher.progress import StartProgress
    from phalanx.serve.app import HttpFront
    from phalanx.serve.server import HttpServer, bind, url_of, with_bounds

    given = [f"serve.{key}={value}" for key, value in (("host", host), ("port", port)) if value is not None]
    settings = with_bounds(load_config(config, [*(overrides or ()), *given]))
    with (
        _log_lines(logging.getLogger("phalanx.access")),
        bind(settings.serve.host, settings.serve.port) as bound,  # a port that is taken is known before a long start
    ):
        with StartProgress() as progress:
            engine = AsyncEngine.from_config(settings, on_progress=progress.update, ranks_apart=True)
        with closing(engine):
            progress.show_startup(engine.startup, engine.plan)
            front = HttpFront(engine)
            front.service.prepare()
            console = Console(stderr=True, highlight=False)
            told = f"serving [bold]{front.service.model_name}[/] at [bold]{url_of(bound)}[/]"
            server = HttpServer(front, on_start=lambda: console.print(told), on_idle=gc.collect)
            # What is there by now stays: a collection that walked it would hold up everything for 0.2 s. Even one of
            # what is new takes 0.1 s where that is hundreds of long prompts. Requests leave no cycles behind, on none
            # of their ways out that are known, so that what others may is left until nothing is going on.
            gc.collect()
            gc.freeze()
            gc.set_threshold(COLLECTION_OBJECTS)
            # The event loop gives up Python's lock at each write, and would get it back after 5 ms of another thread.
            sys.setswitchinterval(SWITCH_S)
            server.run(sockets=[bound])
            front.close()


@contextmanager
def _log_lines(log: logging.Logger) -> Iterator[None]:
    """Lets a log write to standard error what it is given and nothing else, whatever the level of others; afterwards it
    is as it was.
    """
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
