"""A call on the engine for a request over HTTP: bounded in time, and noted for logs and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from phalanx.engine.request import Delta, RequestOutput
from phalanx.engine.sampling_params import SamplingParams
from phalanx.serve.answers import Usage
from phalanx.serve.errors import ApiError
from phalanx.serve.exchange import Exchange
from phalanx.serve.tracing import Operation, request_attributes, response_attributes

if TYPE_CHECKING:
    from phalanx.serve.service import Service


OPERATIONS: dict[str, Operation] = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}


class Generation:
    """Prompts being completed. To be followed by one reader, once; where it stops, the rest is aborted."""

    def __init__(
        self,
        service: Service,
        exchange: Exchange,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        priority: int = 0,
    ) -> None:
        """Raises ApiError for more prompts than can be served at all."""
        service.check_count(len(prompts) * params.n)
        self.prompts = prompts
        self.params = params
        self._service = service
        self._exchange = exchange
        self._priority = priority
        self._last_s: dict[tuple[int, int], float] = {}
        self._timed_out = False
        exchange.prompt_tokens = sum(map(len, prompts))
        exchange.trace |= request_attributes(
            OPERATIONS[exchange.path],
            service.model_name,
            params,
            response_id=exchange.request_id,
            stream=exchange.streamed,
        )
        self._outputs: list[RequestOutput] = []

    async def events(self) -> AsyncGenerator[Delta | RequestOutput, None]:
        """What the engine brings. Past the time limit, or at the end of a drain, it ends with what there is, by the
        finish reason `abort`.

        Raises what the engine raises, and ApiError where the time limit came before the first token.
        """
        service, loop = self._service, asyncio.get_running_loop()
        request_id = service.open_call()
        left_s = self._exchange.began_s + service.settings.request_timeout_s - time.perf_counter()
        limit = loop.call_later(max(0.0, left_s), self._time_out, request_id)
        stream = service.engine.stream(self.prompts, self.params, request_id=request_id, priority=self._priority)
        try:
            async with aclosing(stream):
                async for event in stream:
                    if isinstance(event, Delta):
                        self._note(event)
                    else:
                        self._note_end(event)
                    yield event
            exchange = self._exchange
            exchange.trace |= response_attributes(
                self._outputs, queue_s=exchange.queued_s, first_token_s=exchange.first_token_s
            )
        finally:
            limit.cancel()
            service.close_call(request_id, self._exchange.output_tokens > 0)

    async def outputs(self) -> list[RequestOutput]:
        """All of it, in order of the prompts."""
        async with aclosing(self.events()) as events:
            found = [event async for event in events if isinstance(event, RequestOutput)]
        return sorted(found, key=lambda output: output.request)

    def usage(self, dropped: bool = False) -> Usage:
        """So far. dropped: whether the answer leaves out what was drawn."""
        exchange = self._exchange
        drawn = 0 if dropped else exchange.output_tokens
        return {
            "prompt_tokens": exchange.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": exchange.prompt_tokens + drawn,
            "prompt_tokens_details": {"cached_tokens": exchange.cached_tokens},
        }

    def _time_out(self, request_id: str) -> None:
        self._timed_out = True
        self._service.abort(request_id)

    def cut_off(self) -> ApiError:
        """What a client is told that waited in vain."""
        if self._timed_out:
            limit_s = self._service.settings.request_timeout_s
            return ApiError(
                504,
                f"no token came within the {limit_s:g} s that a request may take (serve.request_timeout_s); send it "
                "again when less is going on, or raise the limit",
                code="timeout",
            )
        return ApiError(503, "the server is stopping; send the request to another", code="draining", retry_after_s=1)

    def _note(self, delta: Delta) -> None:
        now_s, metrics, exchange = time.perf_counter(), self._service.metrics, self._exchange
        if not delta.token_ids:
            if delta.finish_reason == "abort" and not exchange.output_tokens:
                raise self.cut_off()
            return
        place = delta.request, delta.completion
        last_s = self._last_s.get(place)
        if last_s is None:
            if exchange.first_token_s is None:
                exchange.first_token_s = now_s - exchange.began_s
                metrics.first_token(exchange.first_token_s)
                exchange.span.event("first_token")
        else:
            metrics.between_tokens(now_s - last_s, len(delta.token_ids))
        self._last_s[place] = now_s
        exchange.output_tokens += len(delta.token_ids)

    def _note_end(self, output: RequestOutput) -> None:
        exchange, metrics = self._exchange, self._service.metrics
        exchange.cached_tokens += output.num_cached_tokens
        exchange.queued_s = max(exchange.queued_s or 0.0, output.timings.queued_s)
        metrics.queued(output.timings.queued_s)
        self._outputs.append(output)
        for completion in output.completions:
            exchange.finish_reasons.append(completion.finish_reason)
            if len(completion.token_ids) > 1:
                metrics.per_output_token(completion.timings.time_per_output_token_s)
        metrics.finished(
            exchange.path,
            output.finish_reason,
            time.perf_counter() - exchange.began_s,
            len(output.prompt_token_ids),
            sum(len(completion.token_ids) for completion in output.completions),
        )
