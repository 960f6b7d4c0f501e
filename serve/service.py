"""What the handlers of one server share: the engine, its limits, and what is going on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from phalanx import __version__
from phalanx.engine.grammar import Grammars
from phalanx.errors import PhalanxError
from phalanx.launcher.async_engine import AsyncEngine
from phalanx.serve.answers import Status
from phalanx.serve.errors import ApiError, as_api_error, first_line
from phalanx.serve.keys import ApiKeys
from phalanx.serve.metrics import Metrics
from phalanx.serve.protocol import GenerationRequest
from phalanx.serve.reader_process import ReaderProcess
from phalanx.serve.request_reader import Read, RequestReader
from phalanx.serve.sampling import MakeGuide, is_guided, make_guide
from phalanx.serve.tool_calls import JSON, ToolFormat, knows_tools, parser_for

T = TypeVar("T")

SHORT_BODY = 8 << 10  # bytes that are read in about a millisecond; passing them on would cost half as much
MAX_RETRY_S = 60.0


class Service:
    """One served model."""

    def __init__(self, engine: AsyncEngine, endpoints: Collection[str]) -> None:
        """endpoints: paths that there are. Raises PhalanxError for keys or a template that cannot be read."""
        self.engine = engine
        self.settings = engine.config.serve
        self.model_name = self.settings.model_name or engine.config.model.path
        self.began_s = time.time()
        self.draining = False
        self.keys = None if self.settings.api_keys is None else ApiKeys(Path(self.settings.api_keys))
        self.chat_template = engine.tokenizer.chat_template
        if self.settings.chat_template is not None:
            self.chat_template = _read(Path(self.settings.chat_template))
        name = self.settings.tool_format
        self.tool_format: ToolFormat | None = parser_for(self.chat_template, name)
        self.knows_tools = knows_tools(self.chat_template)
        ends = (engine.tokenizer.token_bytes(token, False) for token in engine.tokenizer.eos_token_ids)
        self.special_texts = engine.tokenizer.special_texts - {end.decode("utf-8", "replace") for end in ends}
        self.fingerprint = f"phalanx-{__version__}"
        self.grammars = Grammars(engine.tokenizer, engine.vocab_size, engine.tokenizer.eos_token_ids)
        self.metrics = Metrics(
            engine.replica_stats,
            lambda: engine.failure is None,
            model_name=self.model_name,
            layout=str(engine.plan.layout),
            endpoints=endpoints,
            comm_totals=engine.comm_totals,
        )
        self._reader = RequestReader(
            engine.tokenizer,
            chat_template=self.chat_template,
            model_name=self.model_name,
            max_length=self.max_length,
            vocab_size=engine.vocab_size,
        )
        self._reader_process = ReaderProcess(self._reader)
        self._reading = ThreadPoolExecutor(1, "phalanx-reading")
        self._threads = ThreadPoolExecutor(2, "phalanx-texts")
        self._compiling = ThreadPoolExecutor(1, "phalanx-grammars")
        self._compiling.submit(self.grammars.prepare)
        self.num_requests = 0  # over HTTP, whatever they are at
        self._calls: set[str] = set()
        self._numbers = itertools.count()
        self._ended_s: deque[float] = deque(maxlen=64)

    # ---- limits ----

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.engine.limits.max_length

    @property
    def max_open(self) -> int | None:
        """Requests that may be open at once: those beyond would be refused by the engine."""
        limits = self.engine.limits
        if limits.max_waiting is None:
            return None
        return self.engine.config.parallel.replicas * (limits.max_sequences + limits.max_waiting)

    @property
    def forced_format(self) -> ToolFormat:
        """What calls are read by that a request forces on the model."""
        return JSON if self.tool_format is None else self.tool_format.forced()

    def shows_special_tokens(self, form: ToolFormat | None) -> bool:
        """Whether calls of a form can be read only with special tokens in the text."""
        return form is not None and form.needs_special_tokens(self.engine.tokenizer.special_texts)

    def check_count(self, count: int) -> None:
        """Raises ApiError for more completions than may ever be open, before any is made ready."""
        if self.max_open is not None and count > self.max_open:
            raise ApiError(
                400,
                f"{count} completions at once are more than the {self.max_open} that may run or wait "
                "(engine.max_sequences, engine.max_waiting); send fewer at a time",
                param="n",
            )

    # ---- work beside the event loop ----

    async def read(self, method: Read[T], body: bytes) -> T:
        """What a method of the reader makes of a body. Raises ApiError and PhalanxError as it does."""
        if len(body) <= SHORT_BODY:
            return method(self._reader, body)
        return await asyncio.get_running_loop().run_in_executor(self._reading, self._reader_process.read, method, body)

    async def beside(self, work: Callable[[], T]) -> T:
        """Does work that takes long, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def guide(self, wanted: GenerationRequest) -> MakeGuide | None:
        """What holds the text to the form that a request asks for, None where it asks for none."""
        if not is_guided(wanted):
            return None
        return await asyncio.get_running_loop().run_in_executor(self._compiling, make_guide, wanted, self.grammars)

    async def schema_guide(self, schema: dict[str, Any]) -> MakeGuide:
        """What holds the text to a JSON schema."""
        return await asyncio.get_running_loop().run_in_executor(self._compiling, self.grammars.json_schema, schema)

    # ---- calls on the engine ----

    @property
    def num_open(self) -> int:
        """Calls on the engine that have not ended."""
        return len(self._calls)

    def open_call(self) -> str:
        """A name for a call on the engine, never used again."""
        request_id = f"http {next(self._numbers)}"
        self._calls.add(request_id)
        return request_id

    def close_call(self, request_id: str, served: bool) -> None:
        """served: whether tokens came of it."""
        self._calls.discard(request_id)
        if served:
            self._ended_s.append(time.monotonic())

    def abort(self, request_id: str) -> None:
        self.engine.end_calls(request_id)

    def abort_all(self) -> None:
        """Ends every call with what there is of it."""
        for request_id in list(self._calls):
            self.abort(request_id)

    @property
    def retry_after_s(self) -> float:
        """When there may be room again: the time in which what is open ends, at the pace of late."""
        if len(self._ended_s) < 2:
            return 1.0
        pace = (len(self._ended_s) - 1) / max(1e-3, time.monotonic() - self._ended_s[0])
        return min(MAX_RETRY_S, max(1.0, self.num_open / pace))

    def refusal(self, error: Exception) -> ApiError:
        """What a client is told of an error."""
        if error in self.engine.failures:  # be it a bug: it is not this request's
            return ApiError(503, f"the engine has failed: {first_line(error)}", code="engine_failed")
        return as_api_error(error, self.retry_after_s)

    # ---- what goes on ----

    def status(self) -> Status:
        engine = self.engine
        layout = engine.plan.layout
        places = [place for replica in range(layout.replicas) for place in layout.places(replica)]
        return {
            "model": self.model_name,
            "layout": str(layout),
            "state": "failed" if engine.failure else "draining" if self.draining else "running",
            "uptime_s": time.time() - self.began_s,
            "max_length": self.max_length,
            "ranks": [
                {
                    "rank": place.rank,
                    "replica": place.replica,
                    "stage": place.stage,
                    "shard": place.tensor_rank,
                    "node": ready.node,
                    "pid": ready.pid,
                    "layers": list(layout.stages[place.stage].layers),
                }
                for place, ready in zip(places, engine.startup.ranks, strict=True)
            ],
            "replicas": [asdict(stats) for stats in engine.replica_stats()],
        }

    def prepare(self) -> None:
        """Begins what the first requests would wait for."""
        self._reading.submit(self._reader_process.start)

    def close(self) -> None:
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._reader_process.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self.grammars.close()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PhalanxError(f"the chat template cannot be read: {error}; see serve.chat_template") from None
