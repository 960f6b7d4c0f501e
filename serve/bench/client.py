"""An HTTP client of OpenAI-compatible servers that notes when each token comes, at little cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from phalanx.errors import PhalanxError, RequestError
from phalanx.launcher.bench.workloads import RequestShape
from phalanx.serve.bench.sse import DONE, EventLines, Usage, error_message, read_chunk

CONNECT_S = 30.0
# Servers close idle connections, most after 5 s: one that is taken up just then fails a request that did no wrong.
KEEP_ALIVE_S = 2.0
POLL_S = 0.1
ABORTED = ("abort", "error")  # finish reasons of servers that give up a request
_COMMON = (  # about a token each, in most vocabularies
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system question work number night point home water room mother area money story fact "
    "month lot right study book eye job word business issue side kind head house service friend father power hour game "
    "line end member law car city name team minute idea body back parent face level office door health person art war"
)
WORDS = _COMMON.split()


class Failure(NamedTuple):
    """kind: under which failures are counted: `HTTP 429`, `time-out`. message: what was said of this one."""

    kind: str
    message: str


class Answer(NamedTuple):
    """What became of a request. chunk_s: when each chunk with output came, by time.perf_counter. usage: tokens as the
    server counts them, None where it does not say. failure: None of a request that was served to its end.
    """

    chunk_s: tuple[float, ...]
    usage: Usage | None
    failure: Failure | None


class RequestForm(NamedTuple):
    """How requests are put. words: prompts are of words, not of token ids, as they are in chats."""

    model: str
    chat: bool = False
    words: bool = False
    ignore_eos: bool = True

    @property
    def path(self) -> str:
        return "/chat/completions" if self.chat else "/completions"

    def body(self, shape: RequestShape) -> bytes:
        """The JSON of a request. A prompt of words has about as many tokens as the shape's."""
        prompt = (
            " ".join(WORDS[token % len(WORDS)] for token in shape.prompt) if self.chat or self.words else shape.prompt
        )
        fields: dict[str, Any] = {"model": self.model}
        fields |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        fields |= {"max_tokens": shape.max_tokens, "temperature": 0.0}
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)


def api_root(url: str) -> str:
    """The address of a server, with or without a scheme and `/v1`, as `http://host:port`. Raises RequestError."""
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise RequestError(f"{url!r} is no address of a server; give it as http://HOST:PORT, with or without /v1")
    return text.rstrip("/").removesuffix("/v1")


class HttpClient:
    """Any number of requests at a time to one server. To be used as an async context manager.

    num_chunks: with output, that came so far.
    """

    def __init__(self, root: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self.root = root
        self.num_chunks = 0
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def complete(self, path: str, body: bytes) -> Answer:
        """Sends a request and reads its stream to the end. What goes wrong is in the answer."""
        chunk_s: list[float] = []
        try:
            async with self._session.post(
                f"{self.root}/v1{path}",
                data=body,
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    message = error_message(await response.read())
                    return Answer((), None, Failure(f"HTTP {response.status}", message))
                usage, failure = await self._follow(response.content, chunk_s)
                return Answer(tuple(chunk_s), usage, failure)
        except TimeoutError:
            failure = Failure("time-out", f"not finished after {self._timeout_s:g} s, {len(chunk_s)} chunks had come")
        except aiohttp.ClientConnectorError as error:
            failure = Failure("no connection", str(error))
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            failure = Failure("disconnected", f"after {len(chunk_s)} chunks: {error or type(error).__name__}")
        except (aiohttp.ClientError, msgspec.DecodeError, UnicodeDecodeError) as error:
            failure = Failure("not understood", f"{type(error).__name__}: {error}")
        return Answer(tuple(chunk_s), None, failure)

    async def _follow(self, stream: aiohttp.StreamReader, chunk_s: list[float]) -> tuple[Usage | None, Failure | None]:
        events, usage, reason = EventLines(), None, None
        while data := await stream.readany():
            now_s = time.perf_counter()
            for event in events.feed(data):
                if event == DONE:
                    continue
                chunk = read_chunk(event)
                if chunk.has_token:
                    chunk_s.append(now_s)
                    self.num_chunks += 1
                usage, reason = chunk.usage or usage, chunk.finish_reason or reason
                if chunk.error is not None:
                    return usage, Failure("error in the stream", error_message(event))
        if reason is None or reason in ABORTED:
            said = "without a finish reason" if reason is None else f"as {reason!r}"
            return usage, Failure("cut short", f"the stream ended {said} after {len(chunk_s)} chunks")
        return usage, None if chunk_s else Failure("no tokens", "the stream ended without any output")

    async def models(self) -> list[str]:
        """The names of the models that the server has. Raises PhalanxError where it is none, or not there."""
        url = f"{self.root}/v1/models"
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=CONNECT_S)) as response:
                body = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise PhalanxError(
                f"no server answers at {self.root}: {error or type(error).__name__}; start one there, such as "
                "`phalanx serve CONFIG`, or give the address of one that runs"
            ) from None
        if response.status in (401, 403):
            raise PhalanxError(
                f"{url} answers {response.status}: {error_message(body)}; give a key with --api-key-file FILE"
            )
        if response.status != 200:
            raise PhalanxError(
                f"{url} answers {response.status}: {error_message(body)}; is it the address of an OpenAI-compatible "
                "server, such as http://127.0.0.1:8000?"
            )
        try:
            return [model.id for model in msgspec.json.decode(body, type=_Models).data]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PhalanxError(f"{url} answers with what is no list of models: {error}") from None

    async def describe(self) -> dict[str, Any]:
        """What the server says of itself beside its models, where it does: `version`, `layout`."""
        version, status = await self._get_json("/version"), await self._get_json("/status")
        known = {"version": version.get("version"), "layout": status.get("layout")}
        return {name: value for name, value in known.items() if isinstance(value, str)}

    async def drained(self, timeout_s: float) -> bool:
        """Waits until the server has nothing to do, so long at most. True at once where it does not tell."""
        ends_s = time.perf_counter() + timeout_s
        while num_requests(await self._get_json("/status")):
            if time.perf_counter() > ends_s:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def _get_json(self, path: str) -> dict[str, Any]:
        """An object; an empty one where the server has none to give."""
        try:
            async with self._session.get(self.root + path, timeout=aiohttp.ClientTimeout(total=CONNECT_S)) as response:
                data = msgspec.json.decode(await response.read())
        except (TimeoutError, aiohttp.ClientError, OSError, msgspec.DecodeError, UnicodeDecodeError):
            return {}
        return data if response.status == 200 and isinstance(data, dict) else {}


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Replica(msgspec.Struct):
    running: int
    waiting: int


class _Status(msgspec.Struct):
    replicas: list[_Replica] = []


def num_requests(status: Mapping[str, Any]) -> int:
    """Requests that a server has, as its /status says; 0 where that says nothing of them."""
    try:
        replicas = msgspec.convert(status, _Status).replicas
    except msgspec.ValidationError:
        return 0
    return sum(each.running + each.waiting for each in replicas)
