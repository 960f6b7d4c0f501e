"""A server for the page whose every answer the test gives, piece by piece."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from phalanx.serve.page_files import page_routes

PATIENCE_S = 20.0


class Answer:
    """One streamed answer. `body` is what was asked, `path` where; `closed` is set once the stream has ended."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.path, self.body = path, body
        self.closed = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()

    def say(self, text: str, finish: str | None = None) -> None:
        choice = {"text": text} if self.path == "/v1/completions" else {"delta": {"content": text}}
        self.event({"choices": [{"index": 0, **choice, "finish_reason": finish}]})

    def event(self, data: dict[str, Any]) -> None:
        self.raw(f"data: {json.dumps(data)}\n\n".encode())

    def end(self, prompt_tokens: int = 7, completion_tokens: int = 3) -> None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        self.event({"choices": [], "usage": usage})
        self.raw(b"data: [DONE]\n\n")
        self.raw(None)

    def raw(self, piece: bytes | None) -> None:
        """None ends the stream as it stands."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            while (piece := await self._pieces.get()) is not None:
                yield piece
        finally:
            self.closed.set()


class PageServer:
    """Serves the page on 127.0.0.1, in a thread. Set `status`, `key` and `refusals` at any time.

    refusals: (HTTP status, message) for the next requests for text, in order. polls: how often /status was asked for.
    """

    def __init__(self, status: dict[str, Any], port: int = 0) -> None:
        self._given: list[Answer] = []
        self.begin(status)
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        routes = [
            *page_routes(),
            Route("/status", self._status),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def begin(self, status: dict[str, Any]) -> None:
        """Forgets all that was set and asked, and ends what streams."""
        self.status = status
        self.key: str | None = None
        self.refusals: list[tuple[int, str]] = []
        self.polls = 0
        self._asked: queue.Queue[Answer] = queue.Queue()
        for answer in self._given:
            answer.raw(None)
        self._given = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.begin(self.status)
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def answer(self) -> Answer:
        """The next request for text that was not refused."""
        return self._asked.get(timeout=PATIENCE_S)

    @property
    def asked(self) -> bool:
        """Whether there is a request for text that no `answer` has taken."""
        return not self._asked.empty()

    async def _status(self, request: Request) -> Response:
        self.polls += 1
        return self._lacks_key(request) or JSONResponse(self.status)

    async def _models(self, request: Request) -> Response:
        return self._lacks_key(request) or JSONResponse({"object": "list", "data": [{"id": "served-name"}]})

    async def _complete(self, request: Request) -> Response:
        if refusal := self._lacks_key(request):
            return refusal
        if self.refusals:
            return _error(*self.refusals.pop(0))
        answer = Answer(request.url.path, await request.json())
        self._asked.put(answer)
        self._given.append(answer)
        return StreamingResponse(answer.stream(), media_type="text/event-stream")

    def _lacks_key(self, request: Request) -> Response | None:
        given = request.headers.get("authorization")
        if self.key is None or given == f"Bearer {self.key}":
            return None
        return _error(401, "this key is not known" if given else "an API key is needed")


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status_code=status)


def status_of(*replicas: Sequence[int], busy: float = 0.5, **fields: Any) -> dict[str, Any]:
    """What /status says of replicas that are given as the number of ranks of each stage; ten layers a stage."""
    places = [
        (replica, stage, shard)
        for replica, stages in enumerate(replicas)
        for stage, num_ranks in enumerate(stages)
        for shard in range(num_ranks)
    ]
    ranks = [
        {
            "rank": rank,
            "replica": replica,
            "stage": stage,
            "shard": shard,
            "node": f"node-{rank // 2}",
            "pid": 4000 + rank,
            "layers": [10 * stage, 10 * stage + 10],
        }
        for rank, (replica, stage, shard) in enumerate(places)
    ]
    stats = [
        {
            "running": 5,
            "waiting": 2,
            "pages": 1000,
            "pages_used": 400,
            "pages_kept": 100,
            "tokens_per_s": 123.4,
            "stage_busy": [busy for _ in stages],
            "requests": 9,
            "finished": 2,
            "aborted": 1,
            "prompt_tokens": 200,
            "prompt_tokens_cached": 50,
            "output_tokens": 77,
            "preemptions": 3,
            "steps": 10,
        }
        for stages in replicas
    ]
    layout = " / ".join("+".join(map(str, stages)) for stages in replicas)
    said = {"model": "tiny", "layout": layout, "state": "running", "uptime_s": 61.0, "max_length": 2048}
    return {**said, "ranks": ranks, "replicas": stats, **fields}
