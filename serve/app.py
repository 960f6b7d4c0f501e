"""The HTTP application: which path does what. Its OpenAPI document is at `/openapi.json`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from phalanx import __version__
from phalanx.errors import PhalanxError
from phalanx.launcher.async_engine import AsyncEngine
from phalanx.serve import answers
from phalanx.serve.chat import chat
from phalanx.serve.completions import complete
from phalanx.serve.errors import ApiError, JsonResponse
from phalanx.serve.exchange import Exchange
from phalanx.serve.gate import Gate
from phalanx.serve.health import Health
from phalanx.serve.page_files import page_routes
from phalanx.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from phalanx.serve.request_reader import RequestReader
from phalanx.serve.service import Service
from phalanx.serve.tracing import Tracing

REFUSALS = {
    400: "The request cannot be served as it is; the message says what is allowed.",
    401: "An API key is needed.",
    404: "The model is not served here.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "Too much is going on; Retry-After says when to try again.",
    503: "The server is stopping, or its ranks have failed.",
    504: "The request took too long.",
}

ANY_REFUSALS = (401, 408, 413)  # of every path

Handler = Callable[..., Coroutine[Any, Any, Response]]


def create_app(engine: AsyncEngine) -> ASGIApp:
    """The application that serves an engine, by the `serve` section of its configuration.

    Raises PhalanxError for keys, a template or traces that cannot be had.
    """
    return HttpFront(engine).app


class HttpFront:
    """The application, and what a server needs of it. service: its state. app: the ASGI application."""

    def __init__(self, engine: AsyncEngine) -> None:
        # A path is as it is written: a redirect would go to whatever host the client names.
        api = _Api(title="Phalanx", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
        self.tracing = Tracing.to(engine.config.serve.traces)
        self.service = Service(engine, endpoints=PATHS)
        self.health = Health(engine)
        api.state.front = self
        for path, handler, wanted, answer, chunk in POSTS:
            served = {"model": answer, **_stream_of(chunk)}
            api.post(
                path,
                openapi_extra=_body_of(wanted),
                response_class=JsonResponse,
                responses={200: served, **_refusals(REFUSALS)},
            )(handler)
        for path, handler, answer, statuses in GETS:
            described: dict[int | str, dict[str, Any]] = {status: {"model": answer} for status in statuses}
            api.get(path, response_class=JsonResponse, responses=_refusals(ANY_REFUSALS) | described)(handler)
        api.get("/metrics", response_class=Response, include_in_schema=False)(metrics)
        api.router.routes.extend(page_routes())
        for kind in (ApiError, PhalanxError, HTTPException):
            api.add_exception_handler(kind, _told)
        api.add_exception_handler(Exception, _passed_on)
        self.app: ASGIApp = Gate(_Shortcut(api), self.service, self.tracing)

    def close(self) -> None:
        self.service.close()
        self.tracing.close()


class _Api(FastAPI):
    """Adds to the document what FastAPI does not see: bodies, which `_read` reads, and the chunks of streams."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            models: list[tuple[str, Literal["validation"], TypeAdapter[Any]]] = [
                (model.__name__, "validation", TypeAdapter(model))
                for _, _, wanted, _, chunk in POSTS
                for model in (wanted, chunk)
                if model is not None
            ]
            _, schemas = TypeAdapter.json_schemas(models, ref_template="#/components/schemas/{model}")
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            self.openapi_schema = document
        return self.openapi_schema


class _Shortcut:
    """Hands what is posted straight to its handler. FastAPI's way there takes a third of a millisecond for a request,
    and four more calls for each token; all else goes that way.
    """

    def __init__(self, api: FastAPI) -> None:
        self._api = api
        self._handlers = {post[0]: post[1] for post in POSTS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self._api(scope, receive, send)
            return
        scope["app"] = self._api
        request = Request(scope, receive)
        try:
            response = await handler(request, _front(request))
        except (ApiError, PhalanxError) as error:
            response = await _told(request, error)
        await response(scope, receive, send)


def _body_of(wanted: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{wanted.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _stream_of(chunk: type | None) -> dict[str, Any]:
    """The other form of an answer: as a stream of chunks."""
    if chunk is None:
        return {}
    words = f"A {chunk.__name__} as JSON, or an Error, which ends the stream; [DONE] in the last event."
    event = {"type": "object", "properties": {"data": {"type": "string", "description": words}}, "required": ["data"]}
    return {"content": {"text/event-stream": {"schema": {**event, "description": "Each of the server-sent events."}}}}


def _refusals(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": answers.Error, "description": REFUSALS[status]} for status in statuses}


async def _told(request: Request, error: Exception) -> Response:
    """What a client is told of an error."""
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        words = f"{request.method} {request.url.path[:100]}: {error.detail}; /openapi.json says what there is"
        told = ApiError(error.status_code, words, code=code)
    else:
        told = _front(request).service.refusal(error)
    response = Exchange.of(request).refused(told).response()
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response


async def _passed_on(request: Request, error: Exception) -> Response:
    """A bug is the gate's to tell: what is framed here would say it in words of its own."""
    raise error


def _front(request: Request) -> HttpFront:
    front: HttpFront = request.app.state.front
    return front


async def _front_given(request: Request) -> HttpFront:  # one that is not async would be run in a thread
    return _front(request)


Front = Annotated[HttpFront, Depends(_front_given)]


async def completions(request: Request, front: Front) -> Response:
    """Completes prompts."""
    read = await front.service.read(RequestReader.completion, await request.body())
    return await complete(front.service, Exchange.of(request), read.wanted, read.prompts)


async def chat_completions(request: Request, front: Front) -> Response:
    """Goes on with a conversation."""
    read = await front.service.read(RequestReader.chat, await request.body())
    return await chat(front.service, Exchange.of(request), read.wanted, read.prompt)


async def tokenize(request: Request, front: Front) -> Response:
    """The tokens of a prompt, or of a conversation."""
    return JsonResponse(await front.service.read(RequestReader.tokenize, await request.body()))


async def detokenize(request: Request, front: Front) -> Response:
    """The text of tokens."""
    return JsonResponse(await front.service.read(RequestReader.detokenize, await request.body()))


async def models(front: Front) -> Response:
    """The model that is served."""
    service = front.service
    model: answers.Model = {
        "id": service.model_name,
        "object": "model",
        "created": int(service.began_s),
        "owned_by": "phalanx",
        "max_model_len": service.max_length,
    }
    return JsonResponse({"object": "list", "data": [model]})


async def version() -> Response:
    """The version of the server."""
    return JsonResponse({"version": __version__})


async def status(front: Front) -> Response:
    """The formation, and what its engines do."""
    return JsonResponse(front.service.status())


async def health(front: Front) -> Response:
    """Whether a token could be produced now: 200, or 503 with the reason."""
    problem = await front.health.problem()
    return _health("failed" if problem else "ok", problem)


async def ready(front: Front) -> Response:
    """Whether new requests should be sent here: as `/health`, but not while the server drains."""
    if front.service.draining:
        return _health("draining", "the server is stopping")
    return await health(front)


def _health(state: str, reason: str | None) -> Response:
    return JsonResponse({"status": state, "reason": reason}, 200 if state == "ok" else 503)


async def metrics(request: Request, front: Front) -> Response:
    """For Prometheus."""
    accept = request.headers.get("accept")
    body, content_type = await asyncio.to_thread(front.service.metrics.exposition, accept)
    return Response(body, media_type=content_type)


POSTS: tuple[tuple[str, Handler, type[BaseModel], type, type | None], ...] = (
    ("/v1/completions", completions, CompletionRequest, answers.Completion, answers.Completion),
    ("/v1/chat/completions", chat_completions, ChatRequest, answers.Chat, answers.ChatChunk),
    ("/tokenize", tokenize, TokenizeRequest, answers.Tokenized, None),
    ("/detokenize", detokenize, DetokenizeRequest, answers.Detokenized, None),
)
GETS: tuple[tuple[str, Handler, type, tuple[int, ...]], ...] = (
    ("/v1/models", models, answers.Models, (200,)),
    ("/version", version, answers.Version, (200,)),
    ("/status", status, answers.Status, (200,)),
    ("/health", health, answers.Health, (200, 503)),
    ("/ready", ready, answers.Health, (200, 503)),
)
PATHS = ("/", "/metrics", "/openapi.json", *(post[0] for post in POSTS), *(get[0] for get in GETS))
