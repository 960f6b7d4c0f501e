"""`/v1/chat/completions`: conversations, in the model's own template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response

from phalanx.engine.messages import TokenLogprobs
from phalanx.engine.request import Delta, RequestOutput
from phalanx.engine.request import FinishReason as EngineReason
from phalanx.serve.answers import Chat, ChatChoice, ChatChunk, ChatChunkChoice, ChatDelta, FinishReason, ToolCall
from phalanx.serve.errors import ApiError, JsonResponse
from phalanx.serve.event_stream import DONE, EventStream, event
from phalanx.serve.exchange import Exchange
from phalanx.serve.generation import Generation
from phalanx.serve.logprobs import chat_logprobs
from phalanx.serve.protocol import ChatRequest
from phalanx.serve.sampling import MakeGuide, sampling_params
from phalanx.serve.service import Service
from phalanx.serve.tool_calls import ToolCall as WrittenCall
from phalanx.serve.tool_calls import ToolFormat
from phalanx.serve.tool_parser import Pieces, ToolDelta, ToolParser
from phalanx.serve.tool_schema import constrained_schema


async def chat(service: Service, exchange: Exchange, wanted: ChatRequest, prompt: list[int]) -> Response:
    """The answer to a request, whole or as a stream. Raises ApiError and PhalanxError for one that cannot be served.

    prompt: its conversation in token ids.
    """
    max_tokens = wanted.max_completion_tokens or wanted.max_tokens or max(1, service.max_length - len(prompt))
    exchange.streamed = bool(wanted.stream)
    guide, tool_format = await _tools(service, wanted)
    params = sampling_params(wanted, max_tokens, guide, show_special_tokens=service.shows_special_tokens(tool_format))
    generation = Generation(service, exchange, [prompt], params, wanted.priority or 0)
    answer = _Answer(service, exchange, wanted, generation, tool_format)
    if wanted.stream:
        return EventStream(answer.chunks(), lambda error: exchange.refused(service.refusal(error)))
    return JsonResponse(await answer.whole())


async def _tools(service: Service, wanted: ChatRequest) -> tuple[MakeGuide | None, ToolFormat | None]:
    """What holds the text to its form, and what its tool calls are read by."""
    guide = await service.guide(wanted)
    choice = wanted.tool_choice
    if not wanted.tools or choice == "none":
        return guide, None
    if not service.knows_tools:
        raise ApiError(
            400,
            "the model's chat template has no place for tools; use a model whose template has one, or give the server "
            "one by serve.chat_template",
            param="tools",
        )
    form = service.tool_format
    if choice is None or choice == "auto":
        if form is None:
            raise ApiError(
                400,
                "it is not known how this model writes tool calls; set serve.tool_format, or tool_choice to required",
                param="tools",
            )
        return guide, form
    if guide is not None:
        raise ApiError(
            400, "tool_choice and a form of the text are asked for together; give one of them", param="tool_choice"
        )
    tools = [tool.model_dump(exclude_none=True) for tool in wanted.tools]
    named = choice if isinstance(choice, str) else choice.model_dump()
    schema = constrained_schema(tools, named, wanted.parallel_tool_calls is not False)
    return await service.schema_guide(schema), service.forced_format


class _Answer:
    """What one request is answered, put together from what the engine brings."""

    def __init__(
        self,
        service: Service,
        exchange: Exchange,
        wanted: ChatRequest,
        generation: Generation,
        tool_format: ToolFormat | None,
    ) -> None:
        self._wanted = wanted
        self._generation = generation
        self._tokenizer = service.engine.tokenizer
        self._format = tool_format
        self._hidden = service.special_texts
        self._id = f"chatcmpl-{exchange.request_id}"
        self._created = int(time.time())
        self._model = service.model_name
        self._fingerprint = service.fingerprint

    async def whole(self) -> Chat:
        [output] = await self._generation.outputs()
        answer: Chat = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": [self._choice(output, index) for index in range(len(output.completions))],
            "usage": self._generation.usage(),
        }
        if self._wanted.return_token_ids:
            answer["prompt_token_ids"] = list(output.prompt_token_ids)
        return answer

    def _choice(self, output: RequestOutput, index: int) -> ChatChoice:
        completion = output.completions[index]
        content: str = completion.text
        calls: tuple[WrittenCall, ...] = ()
        if self._format is not None:
            content, calls = self._format.parse(completion.text, self._hidden)
        choice: ChatChoice = {
            "index": index,
            "message": {"role": "assistant", "content": content or (None if calls else ""), "refusal": None},
            "logprobs": None if completion.logprobs is None else chat_logprobs(self._tokenizer, completion.logprobs),
            "finish_reason": _reason(completion.finish_reason, bool(calls)),
        }
        if calls:
            choice["message"]["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        if self._wanted.return_token_ids:
            choice["token_ids"] = list(completion.token_ids)
        return choice

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        wanted = self._wanted
        options = wanted.stream_options
        counted = bool(options and options.continuous_usage_stats)
        parsers = [None if self._format is None else self._format.parser(self._hidden) for _ in range(wanted.n or 1)]
        begun = False
        async with aclosing(self._generation.events()) as events:
            async for each in events:
                if not isinstance(each, Delta):
                    continue
                if not begun:
                    begun = True
                    for index in range(len(parsers)):
                        yield self._opening(index, counted)
                choice = self._next_choice(each, parsers[each.completion])
                if choice is not None:
                    yield self._chunk([choice], counted)
        if options and options.include_usage:
            yield self._chunk([], counted=True)
        yield DONE

    def _opening(self, index: int, counted: bool) -> bytes:
        """The first chunk of a choice says who speaks."""
        choice = _chunk_choice(index, {"role": "assistant", "content": ""})
        if not self._wanted.return_token_ids:
            return self._chunk([choice], counted)
        return self._chunk([choice], counted, list(self._generation.prompts[0]))

    def _next_choice(self, delta: Delta, parser: ToolParser | None) -> ChatChunkChoice | None:
        """What a delta adds, None where that is nothing."""
        wanted = self._wanted
        text, reason, calls = delta.text, delta.finish_reason, False
        pieces = Pieces(text, [])
        if parser is not None:
            pieces = parser.push(text)
            if reason is not None:
                last = parser.finish()
                pieces = Pieces(pieces.content + last.content, [*pieces.deltas, *last.deltas])
            calls = parser.num_calls > 0
        names = wanted.return_token_ids or wanted.logprobs
        if not (pieces.content or pieces.deltas or reason or (names and delta.token_ids)):
            return None
        added: ChatDelta = {}
        if pieces.content:
            added["content"] = pieces.content
        if pieces.deltas:
            added["tool_calls"] = [_tool_delta(piece) for piece in pieces.deltas]
        choice = _chunk_choice(delta.completion, added, None if reason is None else _reason(reason, calls))
        if wanted.logprobs:
            found: tuple[TokenLogprobs, ...] = delta.logprobs
            choice["logprobs"] = chat_logprobs(self._tokenizer, found)
        if wanted.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _chunk(self, choices: list[ChatChunkChoice], counted: bool, prompt_token_ids: list[int] | None = None) -> bytes:
        chunk: ChatChunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }
        if counted:
            chunk["usage"] = self._generation.usage()
        if prompt_token_ids is not None:
            chunk["prompt_token_ids"] = prompt_token_ids
        return event(chunk)


def _chunk_choice(index: int, delta: ChatDelta, reason: FinishReason | None = None) -> ChatChunkChoice:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _tool_delta(piece: ToolDelta) -> ToolCall:
    call: ToolCall = {"index": piece.index, "function": {"arguments": piece.arguments}}
    if piece.id is not None and piece.name is not None:
        call["id"] = piece.id
        call["type"] = "function"
        call["function"]["name"] = piece.name
    return call


def _reason(reason: EngineReason, calls: bool) -> FinishReason:
    """A completion that ends by itself after calls waits for what they give."""
    return "tool_calls" if calls and reason == "stop" else reason
