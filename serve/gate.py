"""What every request passes: limits and keys before it, an eye on the client while it runs, the log after it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import cast, get_args

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phalanx.serve.errors import ApiError, ClientGoneError
from phalanx.serve.exchange import Exchange
from phalanx.serve.metrics import Refusal
from phalanx.serve.service import Service
from phalanx.serve.tracing import Tracing, Value
from phalanx.serve.turnstile import Turnstile

access_log = logging.getLogger("phalanx.access")

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
ABORT = "phalanx.abort"  # extension of the scope: cuts the connection off
OPEN_PATHS = ("/health", "/ready", "/metrics", "/version", "/")  # for probes, scrapers and browsers without a key
REASONS: dict[int, Refusal] = {401: "unauthorized", 404: "not_found", 405: "not_found", 413: "too_large"}
DISCARD_S = 0.5  # for the rest of a body that is too large
WORK_PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


class Gate:
    """Wraps the application. A client that goes away while its request runs has it cancelled, whatever it is at."""

    def __init__(self, app: ASGIApp, service: Service, tracing: Tracing) -> None:
        self._app = app
        self._service = service
        self._tracing = tracing
        self._turnstile = Turnstile()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = Exchange(_request_id(headers), scope["method"], scope["path"], _client(scope))
        scope.setdefault("state", {})["exchange"] = exchange
        answer = _AnswerChannel(send, exchange, _abort_of(scope))
        works = exchange.path in WORK_PATHS and exchange.method == "POST"
        if works:
            exchange.span = self._tracing.start(f"POST {exchange.path}", headers, _trace_of(exchange))
        self._service.num_requests += works
        try:
            try:
                await self._answer(exchange, headers, works, scope, receive, answer)
            except ClientGoneError:
                exchange.disconnected = True
        finally:
            self._service.num_requests -= works
            self._close(exchange)

    async def _answer(
        self,
        exchange: Exchange,
        headers: Headers,
        works: bool,
        scope: Scope,
        receive: Receive,
        answer: _AnswerChannel,
    ) -> None:
        try:
            if works:
                await self._turnstile.wait()
            self._admit(exchange, headers, works)
            replay = _Replay(await self._body(headers, receive))
            answering = self._app(scope, replay.receive, answer.send)
            if works:
                await _while_connected(answering, receive, exchange)
            else:  # an answer takes no time: there is nothing to be cancelled
                await answering
        except ClientGoneError:
            raise
        except ApiError as error:
            await self._refuse(error, scope, receive, answer)
        except Exception as error:  # a bug, after which the server goes on
            await self._refuse(self._service.refusal(error), scope, receive, answer)

    def _admit(self, exchange: Exchange, headers: Headers, works: bool) -> None:
        """Raises ApiError for a request that is not to be looked into."""
        service = self._service
        changes = "upgrade" in headers and "upgrade" in headers.get("connection", "").lower()
        if changes and exchange.method == "POST":  # the parser takes its body for what comes after the change
            raise ApiError(
                400, "this server speaks HTTP/1.1 only; send the request without the header Upgrade", code="upgrade"
            )
        if service.keys is not None and not _is_open(exchange.path):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            exchange.key = service.keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
            if exchange.key is None:
                raise ApiError(
                    401,
                    "this server wants an API key that it knows; send `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                )
        if works and service.draining:
            raise ApiError(503, "the server is stopping; send the request to another", code="draining", retry_after_s=1)
        if works and service.max_open is not None and service.num_requests > service.max_open:
            raise ApiError(
                429,
                f"{service.num_requests} requests are open, more than the {service.max_open} that may run or wait "
                "(engine.max_sequences, engine.max_waiting); try again later",
                code="queue_full",
                retry_after_s=service.retry_after_s,
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """All of it. Raises ApiError where it is too large, or takes too long to come."""
        settings = self._service.settings
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > settings.max_body:
            if "expect" not in headers:  # or the client waits to be told that it may send
                await _discard(receive)
            raise _too_large(settings.max_body)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client went before its request was complete", code="disconnected")
                    part = message.get("body", b"")
                    size += len(part)
                    more = message.get("more_body", False)
                    if size > settings.max_body:
                        parts.clear()
                        if more:
                            await _discard(receive)
                        raise _too_large(settings.max_body)
                    parts.append(part)
                    if not more:
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {settings.body_timeout_s:g} s (serve.body_timeout_s)",
                code="timeout",
            ) from None

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, answer: _AnswerChannel) -> None:
        exchange: Exchange = scope["state"]["exchange"]
        if answer.started:  # with half of an answer out, nothing better can be said
            answer.cut_off()
            return
        response = exchange.refused(error).response()
        # What is left of a body that was not taken cannot be told from the next request.
        response.headers["connection"] = "close"
        await response(scope, receive, answer.send)

    def _close(self, exchange: Exchange) -> None:
        service, seconds = self._service, time.perf_counter() - exchange.began_s
        metrics = service.metrics
        if exchange.refusal is not None:
            metrics.refused(_reason(exchange))
        if exchange.disconnected:
            metrics.disconnected()
        else:
            metrics.answered(exchange.path, exchange.status or 500, seconds)
        # By OpenTelemetry's conventions a refusal with a status of its own is no error of the server's.
        broken = exchange.refusal if exchange.status == 200 else None
        error = broken or ("disconnected" if exchange.disconnected else None)
        exchange.span.end(exchange.status or 499, exchange.trace, error=error)
        if service.settings.access_log:
            access_log.info("%s", _line(exchange, seconds))


class _AnswerChannel:
    """Where a response goes: takes note of it."""

    def __init__(self, send: Send, exchange: Exchange, abort: Callable[[], None]) -> None:
        self._send = send
        self._exchange = exchange
        self.cut_off = abort

    @property
    def started(self) -> bool:
        return self._exchange.status is not None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._exchange.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self._exchange.request_id.encode())]
        await self._send(message)


class _Replay:
    """Where the application reads a body that has come."""

    def __init__(self, body: bytes) -> None:
        self._pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive(self) -> Message:
        if self._pending:
            return self._pending.pop()
        await asyncio.Event().wait()  # a client that goes is not the application's to notice
        return {"type": "http.disconnect"}


async def _while_connected(answering: Awaitable[None], receive: Receive, exchange: Exchange) -> None:
    """Does the work of answering, and cancels it when the client goes."""
    work = asyncio.current_task()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        exchange.disconnected = True
        if work is not None:
            work.cancel()

    watching = asyncio.create_task(watch())
    try:
        await answering
    except asyncio.CancelledError:
        if work is None or not exchange.disconnected or work.uncancel():  # it is the server that ends
            raise
    finally:
        watching.cancel()


async def _discard(receive: Receive) -> None:
    """Takes what comes of a body that is not wanted, for a while: many clients read no answer before all is sent, and
    see but a broken connection where it is closed on them.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while (await receive()).get("more_body", False):
                pass


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes, the most that is taken (serve.max_body)", code="too_large"
    )


def _request_id(headers: Headers) -> str:
    """The client's, where it is one that can stand in a header and a log."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(12)


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else ""


def _abort_of(scope: Scope) -> Callable[[], None]:
    abort: Callable[[], None] = scope.get("extensions", {}).get(ABORT, lambda: None)
    return abort


def _trace_of(exchange: Exchange) -> dict[str, Value]:
    return {
        "http.request.method": exchange.method,
        "url.path": exchange.path,
        "client.address": exchange.client,
        "phalanx.request_id": exchange.request_id,
    }


def _reason(exchange: Exchange) -> Refusal:
    """What a refusal is counted as."""
    if exchange.refusal in get_args(Refusal):
        return cast("Refusal", exchange.refusal)
    status = exchange.status or 0
    return REASONS.get(status, "server_error" if status >= 500 else "invalid")


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/page/")


def _line(exchange: Exchange, seconds: float) -> str:
    """A request as a line of JSON. No texts."""
    line = {
        "time": time.time(),
        "request_id": exchange.request_id,
        "client": exchange.client,
        "key": exchange.key,
        "method": exchange.method,
        "path": exchange.path[:200],
        "status": None if exchange.disconnected and exchange.status is None else exchange.status,
        "seconds": round(seconds, 6),
    }
    if exchange.disconnected:
        line["disconnected"] = True
    if exchange.refusal:
        line["refusal"] = exchange.refusal
    if exchange.prompt_tokens:
        line |= {
            "stream": exchange.streamed,
            "prompt_tokens": exchange.prompt_tokens,
            "cached_tokens": exchange.cached_tokens,
            "output_tokens": exchange.output_tokens,
            "queued_s": exchange.queued_s,
            "first_token_s": exchange.first_token_s,
            "finish_reasons": exchange.finish_reasons,
        }
    return msgspec.json.encode(line).decode()
