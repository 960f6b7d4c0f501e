"""`/v1/completions`: prompts as text or token ids, completed as they are."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response

from phalanx.engine.messages import TokenLogprobs
from phalanx.engine.request import Delta, RequestOutput
from phalanx.serve.answers import Completion, CompletionChoice, FinishReason
from phalanx.serve.errors import JsonResponse
from phalanx.serve.event_stream import DONE, EventStream, event
from phalanx.serve.exchange import Exchange
from phalanx.serve.generation import Generation
from phalanx.serve.logprobs import completion_logprobs, prompt_logprobs
from phalanx.serve.protocol import CompletionRequest
from phalanx.serve.sampling import sampling_params
from phalanx.serve.service import Service

DEFAULT_TOKENS = 16  # as OpenAI has it, or as many as fit
SHORT_PROMPTS = 128  # tokens whose log-probabilities are put down in about a millisecond


async def complete(
    service: Service, exchange: Exchange, wanted: CompletionRequest, prompts: list[list[int]]
) -> Response:
    """The answer to a request, whole or as a stream. Raises ApiError and PhalanxError for one that cannot be served.

    prompts: those of the request in token ids.
    """
    max_tokens = wanted.max_tokens
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_TOKENS, service.max_length - max(map(len, prompts))))
    params = sampling_params(wanted, max_tokens, await service.guide(wanted))
    exchange.streamed = bool(wanted.stream)
    generation = Generation(service, exchange, prompts, params, wanted.priority or 0)
    answer = _Answer(service, exchange, wanted, generation)
    if wanted.stream:
        return EventStream(answer.chunks(), lambda error: exchange.refused(service.refusal(error)))
    return JsonResponse(await answer.whole())


class _Answer:
    """What one request is answered, put together from what the engine brings."""

    def __init__(self, service: Service, exchange: Exchange, wanted: CompletionRequest, generation: Generation) -> None:
        self._service = service
        self._wanted = wanted
        self._generation = generation
        self._tokenizer = service.engine.tokenizer
        self._drops = wanted.max_tokens == 0  # the engine draws a token at least
        self._head: Completion = {
            "id": f"cmpl-{exchange.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
            "system_fingerprint": service.fingerprint,
            "choices": [],
        }

    async def whole(self) -> Completion:
        outputs = await self._generation.outputs()
        wanted = self._wanted
        # Log-probabilities of a long prompt take longer than the event loop should.
        named = wanted.echo or wanted.logprobs is not None or wanted.prompt_logprobs is not None
        weight = sum(len(each.prompt_token_ids) * len(each.completions) for each in outputs) if named else 0

        def make() -> list[CompletionChoice]:
            return [choice for output in outputs for choice in self._choices(output)]

        choices = make() if weight <= SHORT_PROMPTS else await self._service.beside(make)
        return {**self._head, "choices": choices, "usage": self._generation.usage(self._drops)}

    def _choices(self, output: RequestOutput) -> list[CompletionChoice]:
        wanted, n = self._wanted, len(output.completions)
        if output.prompt_logprobs is not None and len(output.prompt_logprobs) < len(output.prompt_token_ids) - 1:
            raise self._generation.cut_off()  # a part of them would pass for all
        echoed = self._echoed(output.request) if wanted.echo else ""
        choices = []
        for index, completion in enumerate(output.completions):
            choice = self._choice(
                output.request * n + index,
                "" if self._drops else completion.text,
                () if self._drops else completion.token_ids,
                completion.finish_reason,
            )
            choice["text"] = echoed + choice["text"]
            if wanted.logprobs is not None:
                found = [] if self._drops else list(completion.logprobs or ())
                first = None
                if wanted.echo:
                    first, found = output.prompt_token_ids[0], [*(output.prompt_logprobs or ()), *found]
                choice["logprobs"] = completion_logprobs(self._tokenizer, first, found, 0)
            if wanted.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs or ())
            if wanted.return_token_ids:
                choice["prompt_token_ids"] = list(output.prompt_token_ids)
            choices.append(choice)
        return choices

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        wanted, n = self._wanted, self._wanted.n or 1
        options = wanted.stream_options
        counted = bool(options and options.continuous_usage_stats)
        offsets: dict[int, int] = {}  # of the choices whose text has begun
        async with aclosing(self._generation.events()) as events:
            async for each in events:
                if isinstance(each, Delta):
                    choice = self._next_choice(each, each.request * n + each.completion, offsets)
                    if choice is not None:
                        yield self._chunk([choice], counted)
        if options and options.include_usage:
            yield self._chunk([], counted=True)
        yield DONE

    def _next_choice(self, delta: Delta, index: int, offsets: dict[int, int]) -> CompletionChoice | None:
        """What a delta adds, None where that is nothing."""
        wanted, begins = self._wanted, index not in offsets
        text = "" if self._drops else delta.text
        if begins:
            text = (self._echoed(delta.request) if wanted.echo else "") + text
        offset = offsets.setdefault(index, 0)
        offsets[index] += len(text)
        names = wanted.return_token_ids or wanted.logprobs is not None
        if not (text or delta.finish_reason or (names and delta.token_ids)):
            return None
        choice = self._choice(index, text, () if self._drops else delta.token_ids, delta.finish_reason)
        if wanted.logprobs is not None:
            found: tuple[TokenLogprobs, ...] = () if self._drops else delta.logprobs
            choice["logprobs"] = completion_logprobs(self._tokenizer, None, found, offset)
        if wanted.return_token_ids and begins:
            choice["prompt_token_ids"] = list(self._generation.prompts[delta.request])
        return choice

    def _choice(
        self, index: int, text: str, token_ids: tuple[int, ...], finish_reason: FinishReason | None
    ) -> CompletionChoice:
        choice: CompletionChoice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if self._wanted.return_token_ids:
            choice["token_ids"] = list(token_ids)
        return choice

    def _chunk(self, choices: list[CompletionChoice], counted: bool) -> bytes:
        chunk: Completion = {**self._head, "choices": choices}
        if counted:
            chunk["usage"] = self._generation.usage(self._drops)
        return event(chunk)

    def _echoed(self, place: int) -> str:
        """A prompt as it was given, or what its tokens stand for."""
        given = self._wanted.prompt
        prompt = given if isinstance(given, str) or isinstance(given[0], int) else given[place]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
