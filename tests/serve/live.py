"""A real server over real ranks of a small model, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from tests.tiny_models import TINY_MODELS, make

from phalanx.launcher.async_engine import AsyncEngine
from phalanx.launcher.config import load_config
from phalanx.serve.app import HttpFront
from phalanx.serve.server import HttpServer, bind, url_of, with_bounds

T = TypeVar("T")

END = 3  # the token that ends a text

CHAT_TEMPLATE = (
    "{% if tools %}{{ tools | length }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sections(folder: Path, **serve: Any) -> dict[str, Any]:
    """A configuration of a tiny model with random weights and a template for chats."""
    model = make(TINY_MODELS["smollm2"], folder)
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": END}))
    template = folder / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "cluster": {"ray": "none", "device": "cpu", "cpus_per_rank": 1, "pin_cores": False},
        "engine": {"kv_cache": "8MiB", "page_size": 4},
        "serve": {"model_name": "tiny", "chat_template": str(template), **serve},
    }


@dataclass(frozen=True)
class Live:
    """A server that runs. loop: its event loop."""

    url: str
    front: HttpFront
    server: HttpServer
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def engine(self) -> AsyncEngine:
        return self.front.service.engine

    def run(self, work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float = 60.0) -> T:
        """Runs a coroutine in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop).result(timeout_s)


@contextmanager
def live(sections: dict[str, Any], timeout_s: float = 60.0) -> Iterator[Live]:
    """Serves a configuration at a free port of this machine."""
    config = with_bounds(load_config(sections))
    with bind("127.0.0.1", 0) as bound:
        engine = AsyncEngine.from_config(config)
        try:
            front = HttpFront(engine)
            server = HttpServer(front)
            loop = uvloop.new_event_loop()
            thread = threading.Thread(target=loop.run_until_complete, args=[server.serve([bound])], name="server")
            thread.start()
            while thread.is_alive() and not server.started:
                time.sleep(0.01)
            try:
                yield Live(url_of(bound), front, server, loop, thread)
            finally:
                loop.call_soon_threadsafe(server.hurry)
                thread.join(timeout_s)
                front.close()
                loop.close()
            if thread.is_alive():
                raise TimeoutError(f"the server did not stop within {timeout_s} s")
        finally:
            engine.close()
