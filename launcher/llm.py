"""`LLM`: a model served to this program, from a configuration to text."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from phalanx.engine.engine import Engine
from phalanx.engine.messages import Progress, RankReady
from phalanx.engine.request import Delta, RequestOutput
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.scheduler import Limits
from phalanx.errors import ConfigError, RequestError
from phalanx.launcher.check import review
from phalanx.launcher.config import load_config
from phalanx.launcher.formation import Formation, open_host
from phalanx.launcher.hosts import RankHost
from phalanx.launcher.machine import this_machine
from phalanx.launcher.run_plan import Decision, RunPlan, plan_run
from phalanx.launcher.schema import Config
from phalanx.launcher.specs import cluster_settings, rank_specs
from phalanx.models.chat import render_chat
from phalanx.models.resolve import ModelSource, resolve_model
from phalanx.models.tokenizer import Tokenizer
from phalanx.parallel.layout import RankPlace

Prompt = str | Sequence[int]
OnProgress = Callable[[RankPlace, Progress], None]

STARTUP_PARTS = ("ray", "actors", "imports", "rendezvous", "weights", "warmup")
"""What the start of a formation consists of, in order; the parts of ranks are those of the slowest."""


@dataclass(frozen=True, slots=True)
class Startup:
    """What starting took and chose.

    startup_s: seconds by part; `model` is finding it and reading its index and tokenizer, `total` everything.
    ranks: what each rank of each replica reported. decisions: what was chosen and why.
    """

    startup_s: Mapping[str, float]
    ranks: tuple[RankReady, ...]
    decisions: tuple[Decision, ...]


class _Running(NamedTuple):
    """A request at work. place: of its prompt in the call."""

    engine: Engine
    name: int
    place: int


class LLM:
    """A model cut over ranks as a configuration says, ready for prompts. Close it, or use it in a `with` block.

    >>> with LLM(model={"path": "smollm2-135m"}, parallel={"tensor": 2}) as llm:
    ...     print(llm.generate(["The capital of France is"], SamplingParams(max_tokens=8))[0].text)
    """

    def __init__(
        self, model: str | Mapping[str, Any], *, on_progress: OnProgress | None = None, **sections: Any
    ) -> None:
        """model, and `cluster`, `parallel`, `comm`, `engine` as keywords: the sections of the YAML file.

        on_progress: hears how far each rank is while it starts. Raises ConfigError with every problem at once,
        ModelError for a model that cannot be read, PlacementError for ranks that cannot be placed, RankFailedError
        for one that fails.
        """
        self._open(load_config({"model": model, **sections}), on_progress)

    @classmethod
    def from_yaml(cls, path: str | Path, *, on_progress: OnProgress | None = None, **overrides: Any) -> Self:
        """From a file. overrides: sections whose keys replace the file's, such as `parallel={"tensor": 2}`."""
        changes = []
        for section, values in overrides.items():
            if isinstance(values, Mapping):
                changes += [f"{section}.{key}={json.dumps(value, default=str)}" for key, value in values.items()]
            else:
                changes.append(f"{section}={json.dumps(values, default=str)}")
        return cls.from_config(load_config(path, changes), on_progress=on_progress)

    @classmethod
    def from_config(cls, config: Config, *, on_progress: OnProgress | None = None) -> Self:
        llm = cls.__new__(cls)
        llm._open(config, on_progress)
        return llm

    def _open(self, config: Config, on_progress: OnProgress | None) -> None:
        started = time.perf_counter()
        self.config = config
        self._formations: list[Formation] = []
        self._engines: list[Engine] = []
        self._source = resolve_model(config.model.path, revision=config.model.revision)
        self.plan = checked_plan(config, self._source)
        # The tokenizer is read while the ranks start.
        with ThreadPoolExecutor(1) as pool:
            entries = self._source.entries()
            tokenizer = pool.submit(self._source.tokenizer)
            model_s = time.perf_counter() - started
            settings, layout = cluster_settings(config, self.plan), self.plan.layout
            hosts: list[RankHost] = []
            try:
                # All replicas' hosts get ready at once; then one replica after another is started.
                for _ in range(layout.replicas):
                    hosts.append(open_host(settings, layout.num_ranks))
                for replica in range(layout.replicas):
                    specs = rank_specs(config, self.plan, self._source.config, entries, replica)
                    host = hosts.pop(0)
                    self._formations.append(Formation.start(specs, settings, on_progress=on_progress, host=host))
                self._tokenizer = tokenizer.result()
            except BaseException:
                for host in hosts:
                    host.stop(0.0)
                self.close()
                raise
        self._engines = [self._engine(formation) for formation in self._formations]
        self.startup = self._startup(model_s, time.perf_counter() - started)

    def _engine(self, formation: Formation) -> Engine:
        plan, limits = self.plan, self.config.engine
        return Engine(
            formation,
            Limits(
                max_sequences=limits.max_sequences,
                max_batch_tokens=limits.max_batch_tokens,
                num_pages=plan.num_pages,
                page_size=plan.page_size,
                max_length=plan.max_length,
                num_stages=len(plan.layout.stages),
            ),
            vocab_size=self._source.config.shape.vocab_size,
            eos_token_ids=self._tokenizer.eos_token_ids,
            tokenizer=self._tokenizer,
            seed=limits.seed,
        )

    def _startup(self, model_s: float, total_s: float) -> Startup:
        ranks = tuple(ready for formation in self._formations for ready in formation.ready)
        seconds = {"model": model_s}
        for part in STARTUP_PARTS:
            host = [formation.startup_s.get(part, 0.0) for formation in self._formations]
            seconds[part] = max([*host, *(ready.startup_s.get(part, 0.0) for ready in ranks)])
        seconds["total"] = total_s
        chosen = sorted({choice for ready in ranks for choice in ready.choices.items()})
        decisions = [Decision(name, *choice.split(": ", 1)) for name, choice in chosen]
        return Startup(seconds, ranks, (*self.plan.decisions, *decisions))

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes prompts, texts or token ids, and returns an output for each, in order.

        params: one for all, or one a prompt. Raises RequestError, before anything runs, where a prompt cannot be
        served, and RankFailedError within seconds where a rank dies meanwhile.
        """
        running = self._add(prompts, params)
        try:
            for _ in self._deltas(running):
                pass
            return [request.engine.take(request.name) for request in running]
        finally:
            _discard(running)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generator[Delta | RequestOutput, None, None]:
        """Completes prompts and yields what is new as it comes; `request` of a Delta is the prompt's place in
        `prompts`.

        The Delta with a finish reason is followed by the request's RequestOutput. Closing the iterator aborts the rest.
        """
        running = self._add(prompts, params)
        by_index = {request.place: request for request in running}
        try:
            for delta in self._deltas(running):
                yield delta
                if delta.finish_reason is not None:
                    request = by_index[delta.request]
                    yield request.engine.take(request.name)
        finally:
            _discard(running)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the model's own template, ready for its reply."""
        tokenizer = self._tokenizer
        text = render_chat(
            tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
        return tokenizer.encode(text, add_special_tokens=False)

    def close(self) -> None:
        """Ends all ranks and leaves nothing behind. Idempotent."""
        with ExitStack() as closing:
            for formation in self._formations:
                closing.callback(formation.close)
        self._formations = []
        self._engines = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[_Running]:
        if not self._engines:
            raise RequestError("this LLM is closed; make a new one")
        listed = _listed(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(listed)
        if len(params) != len(listed):
            raise RequestError(
                f"{len(listed)} prompts but {len(params)} sampling parameters; give one for all or one each"
            )
        running: list[_Running] = []
        try:
            for index, (prompt, each) in enumerate(zip(listed, params, strict=True)):
                engine = self._engines[index % len(self._engines)]
                running.append(_Running(engine, engine.add(prompt, each), index))
        except BaseException as error:
            _discard(running)
            if isinstance(error, RequestError) and len(listed) > 1:
                raise RequestError(f"prompt {len(running)}: {error}") from None
            raise
        return running

    def _deltas(self, running: Sequence[_Running]) -> Iterator[Delta]:
        by_engine: dict[int, list[_Running]] = {}
        for request in running:
            by_engine.setdefault(id(request.engine), []).append(request)
        streams = [_numbered(requests) for requests in by_engine.values()]
        if len(streams) == 1:
            yield from streams[0]
        elif streams:
            yield from _merged(streams)


def checked_plan(config: Config, source: ModelSource) -> RunPlan:
    """The plan of a run, or everything that is known to stop it, before anything is started."""
    machine = this_machine()
    plan = plan_run(config, source.config, machine)
    faults, _ = review(config, plan, source.config, machine)
    if faults:
        raise ConfigError([fault.problem for fault in faults], config.model.path)
    return plan


def _discard(requests: Sequence[_Running]) -> None:
    """Ends requests that nobody will ask for any more; nothing for those whose output was taken."""
    for request in requests:
        request.engine.discard(request.name)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a list of one: a text, or token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are texts or lists of token ids, found {prompts!r:.80}")
    listed: list[Any] = list(prompts)
    return [listed] if listed and all(isinstance(item, int) for item in listed) else listed


def _numbered(requests: Sequence[_Running]) -> Iterator[Delta]:
    """What one engine adds to the requests, numbered by their prompts."""
    index_of = {request.name: request.place for request in requests}
    for delta in requests[0].engine.run(list(index_of)):
        yield delta._replace(request=index_of[delta.request])


def _merged(streams: Sequence[Iterator[Delta]]) -> Iterator[Delta]:
    """The streams of several replicas, each driven by a thread of its own."""
    merged: queue.SimpleQueue[Delta | BaseException | None] = queue.SimpleQueue()
    stopping = threading.Event()

    def drive(stream: Iterator[Delta]) -> None:
        try:
            for delta in stream:
                merged.put(delta)
                if stopping.is_set():
                    break
            merged.put(None)
        except BaseException as error:
            merged.put(error)

    threads = [threading.Thread(target=drive, args=(stream,), name="phalanx-replica") for stream in streams]
    for thread in threads:
        thread.start()
    open_streams = len(threads)
    try:
        while open_streams:
            item = merged.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
