"""A model that is served: the replicas of a configuration, and one door to all of them."""

from __future__ import annotations

import atexit
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from phalanx.engine.comm_book import RankTotals, Waits
from phalanx.engine.driver import EngineDriver
from phalanx.engine.engine import Engine
from phalanx.engine.messages import ProfileSettings, Progress, RankReady, StageStep
from phalanx.engine.request import Mailbox, Request, new_request
from phalanx.engine.router import Router
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.scheduler import Limits
from phalanx.engine.stats import EngineStats
from phalanx.errors import ConfigError, RequestError
from phalanx.launcher.check import review
from phalanx.launcher.config import load_config
from phalanx.launcher.core_view import core_decisions
from phalanx.launcher.formation import Formation, OpenHost, open_host
from phalanx.launcher.hosts import RankHost
from phalanx.launcher.link_rates import GroupLink, group_links
from phalanx.launcher.machine import this_machine
from phalanx.launcher.run_plan import Decision, RunPlan, plan_run
from phalanx.launcher.schema import Config
from phalanx.launcher.specs import cluster_settings, rank_specs
from phalanx.launcher.trace import TracedRank, TracedRun
from phalanx.models.chat import render_chat
from phalanx.models.resolve import ModelSource, resolve_model
from phalanx.models.tensor_entry import TensorEntry
from phalanx.models.tokenizer import Tokenizer
from phalanx.parallel.layout import RankPlace

Prompt = str | Sequence[int]
OnProgress = Callable[[RankPlace, Progress], None]

ALL_STEPS = range(sys.maxsize)
DEAD = sys.maxsize  # the load of a replica that has failed: no other has more

# See `engine.scheduler.Limits`. On a CPU reading weights goes on under computing from some twenty tokens on: 1024 of
# them take 1.00 to 1.05 times as long in steps of 32 as in steps of 512 (smollm2-135m, one thread and two).
STEP_TOKENS = {"cpu": 16, "cuda": 64}
STARTUP_PARTS = ("ray", "actors", "imports", "rendezvous", "weights", "compile", "warmup")
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


class Call(NamedTuple):
    """Prompts that came together. name: what the caller knows them by. key: one of their own, never used again. parts:
    each replica's engine, and the requests that it serves.
    """

    name: str
    key: str
    parts: tuple[tuple[EngineDriver, tuple[Request, ...]], ...]

    @property
    def num_requests(self) -> int:
        return sum(len(requests) for _, requests in self.parts)

    def abort(self) -> None:
        """Ends what has not ended."""
        for driver, requests in self.parts:
            if requests:
                driver.abort(*requests)


class Served:
    """What `LLM` and `AsyncEngine` have in common: everything but the way in which a caller waits."""

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
    def from_config(
        cls,
        config: Config,
        *,
        on_progress: OnProgress | None = None,
        ranks_apart: bool = False,
        trace: bool = False,
        profile: ProfileSettings | None = None,
        open_host: OpenHost = open_host,
    ) -> Self:
        """From a configuration that was loaded before. ranks_apart: a rank is not run in this process even where it is
        the only one: for programs whose other threads must not wait for Python's lock while it computes. trace: ranks
        hand over every step and transfer, for `traced`. profile: and how they look at the steps that `profile_steps`
        names. open_host: makes what runs the ranks of a replica, given where they run and their number.
        """
        served = cls.__new__(cls)
        served._open(config, on_progress, ranks_apart, trace or profile is not None, profile, open_host)
        return served

    def _open(
        self,
        config: Config,
        on_progress: OnProgress | None,
        ranks_apart: bool = False,
        trace: bool = False,
        profile: ProfileSettings | None = None,
        open_host: OpenHost = open_host,
    ) -> None:
        started = time.perf_counter()
        self.config = config
        self._traces = trace
        self._formations: list[Formation] = []
        self._drivers: list[EngineDriver] = []
        self._calls: dict[str, Call] = {}
        self._aborted: set[str] = set()  # keys of calls that were aborted before their prompts were read
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._seeds = random.Random(config.engine.seed)
        self._router = Router(config.parallel.replicas)
        self._source = resolve_model(config.model.path, revision=config.model.revision)
        entries = self._source.known_entries()
        self.plan = checked_plan(config, self._source, entries)
        # The tokenizer is read while the ranks start.
        with ThreadPoolExecutor(1) as pool:
            entries = entries or self._source.entries()
            tokenizer = pool.submit(self._source.tokenizer)
            model_s = time.perf_counter() - started
            settings, layout = cluster_settings(config, self.plan, apart=ranks_apart), self.plan.layout
            hosts: list[RankHost] = []
            try:
                # All replicas' hosts get ready at once; then one replica after another is started.
                for _ in range(layout.replicas):
                    hosts.append(open_host(settings, layout.num_ranks))
                for replica in range(layout.replicas):
                    specs = rank_specs(
                        config, self.plan, self._source.config, entries, replica, trace=trace, profile=profile
                    )
                    host = hosts.pop(0)
                    self._formations.append(Formation.start(specs, settings, on_progress=on_progress, host=host))
                self._tokenizer = tokenizer.result()
            except BaseException:
                for host in hosts:
                    host.stop(0.0)
                self.close()
                raise
        # Where the ranks measured, replicas may have found unlike room: all take what fits the smallest.
        num_pages = min(ready.num_pages for formation in self._formations for ready in formation.ready)
        self._limits = self._engine_limits(num_pages)
        self._drivers = [
            EngineDriver(Engine(formation, self._limits, self.vocab_size), formation) for formation in self._formations
        ]
        atexit.register(self.close)  # before the formations', which the engines' threads are still using
        self.startup = self._startup(model_s, time.perf_counter() - started)

    def _engine_limits(self, num_pages: int) -> Limits:
        plan, settings = self.plan, self.config.engine
        return Limits(
            max_sequences=settings.max_sequences,
            max_batch_tokens=settings.max_batch_tokens,
            num_pages=num_pages,
            page_size=plan.page_size,
            max_length=min(plan.max_length, num_pages * plan.page_size),
            num_stages=len(plan.layout.stages),
            max_waiting=settings.max_waiting,
            keep_prefixes=settings.prefix_cache,
            step_tokens=STEP_TOKENS[plan.device],
        )

    def _startup(self, model_s: float, total_s: float) -> Startup:
        ranks = tuple(ready for formation in self._formations for ready in formation.ready)
        seconds = {"model": model_s}
        for part in STARTUP_PARTS:
            if part == "compile" and not self.config.engine.torch_compile:
                continue
            host = [formation.startup_s.get(part, 0.0) for formation in self._formations]
            seconds[part] = max([*host, *(ready.startup_s.get(part, 0.0) for ready in ranks)])
        seconds["total"] = total_s
        chosen = sorted({choice for ready in ranks for choice in ready.choices.items()})
        decisions = [Decision(name, *choice.split(": ", 1)) for name, choice in chosen]
        cores = core_decisions([formation.ready for formation in self._formations])
        return Startup(seconds, ranks, (*self.plan.decisions, *cores, *decisions))

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can draw; those past the tokenizer's have no text."""
        return self._source.config.shape.vocab_size

    @property
    def limits(self) -> Limits:
        """What bounds the requests of one replica."""
        return self._limits

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None, **settings: Any
    ) -> list[int]:
        """Token ids of a conversation, ready for its reply. template: in place of the model's own. settings: more of
        what `render_chat` takes, such as `tools`.
        """
        tokenizer = self._tokenizer
        text = render_chat(
            template or tokenizer.chat_template,
            messages,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            **settings,
        )
        return tokenizer.encode(text, add_special_tokens=False)

    @property
    def failures(self) -> list[Exception | None]:
        """What ended each replica, None for those that run."""
        return [driver.failure for driver in self._drivers]

    @property
    def failure(self) -> Exception | None:
        """What ended the last of the replicas, or None while one of them runs."""
        failures = self.failures
        return None if None in failures or not failures else failures[-1]

    @property
    def last_results_s(self) -> list[float]:
        """When a step of each replica was last known to be done, on the clock of `time.perf_counter`."""
        return [driver.engine.last_result_s for driver in self._drivers]

    def replica_stats(self) -> list[EngineStats]:
        """What each replica does."""
        return [driver.stats() for driver in self._drivers]

    def profile_steps(self, steps: Sequence[Container[int]]) -> None:
        """From now on ranks look at these steps of each replica. Only where they were started with `profile`."""
        for driver, mine in zip(self._drivers, steps, strict=True):
            driver.engine.profiled = mine

    def stage_steps(self, since_s: float = float("-inf")) -> list[list[list[StageStep]]]:
        """By replica and stage: when each worked on which step, on the clock of `time.perf_counter`; the last 8192."""
        return [driver.engine.timeline.steps(since_s) for driver in self._drivers]

    def comm_totals(self) -> list[RankTotals]:
        """By replica and rank: what transfers took since the start. Ranks report twice a second, and once idle."""
        return [driver.engine.comm_book.totals() for driver in self._drivers]

    def comm_waits(self) -> list[Waits]:
        """By replica and rank: for whom it waited so far, where it knows."""
        return [driver.engine.comm_book.waits() for driver in self._drivers]

    def comm_overlaps(self) -> list[Mapping[int, str]]:
        """By replica and first rank of a stage: how its sums are hidden now, where steps have shown other rates than
        were measured at the start.
        """
        return [driver.engine.comm_book.overlaps() for driver in self._drivers]

    def link_rates(self, replica: int) -> dict[str, GroupLink]:
        """The links of a replica's groups, where they are between machines and of known rates."""
        return group_links(self._formations[replica].ready)

    def all_is_told(self) -> bool:
        """Whether all ranks have reported all steps that were planned so far: their transfers, and what is traced."""
        return all(self._is_told(driver.engine) for driver in self._drivers)

    def _is_told(self, engine: Engine) -> bool:
        last, num_ranks = engine.stats().steps - 1, self.plan.layout.num_ranks
        if num_ranks > 1 and engine.comm_book.last_step < last:
            return False
        told = engine.trace_book.last_steps
        return not self._traces or last < 0 or (len(told) == num_ranks and min(told.values()) >= last)

    def traced(self, steps: Sequence[Container[int]] | None = None) -> TracedRun:
        """What every rank did, on one clock; steps: those of each replica that are wanted, None for all.

        Only of ranks that were started to trace; of each the last 131072 transfers.
        """
        replicas = []
        for replica, driver in enumerate(self._drivers):
            traces = driver.engine.trace_book.traces(ALL_STEPS if steps is None else steps[replica])
            places = self.plan.layout.places(replica)
            replicas.append(tuple(TracedRank(place, traces[place.rank]) for place in places if place.rank in traces))
        return TracedRun(tuple(replicas))

    def end_calls(self, name: str) -> None:
        """Ends every prompt of the call of this name. Nothing where it has ended."""
        with self._lock:
            call = self._calls.get(name)
            if call is not None and not call.parts:  # its prompts are still being read
                self._aborted.add(call.key)
        if call is not None:
            call.abort()

    def _call(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        mailbox: Mailbox,
        *,
        request_id: str | None,
        priority: int,
    ) -> Call:
        """Hands prompts in; what becomes of them comes to the mailbox. To be followed by `_close_call`.

        Raises RequestError, before any of them runs, where one cannot be served.
        """
        drivers = self._drivers
        if not drivers:
            raise RequestError(f"this {type(self).__name__} is closed; make a new one")
        listed = _listed(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(listed)
        if len(params) != len(listed):
            raise RequestError(
                f"{len(listed)} prompts but {len(params)} sampling parameters; give one for all or one each"
            )
        with self._lock:
            key = f"call {next(self._numbers)}"
            name = key if request_id is None else request_id
            if name in self._calls:
                raise RequestError(f"a request {name!r} runs already; give each an id of its own")
            seeds = [self._seeds.getrandbits(63) for _ in listed]
            call = self._calls[name] = Call(name, key, ())
        requests: list[Request] = []
        replicas: list[list[Request]] = [[] for _ in drivers]
        try:
            for place, (prompt, each, seed) in enumerate(zip(listed, params, seeds, strict=True)):
                try:
                    requests.append(self._request(drivers[0], prompt, each, key, place, seed, priority, mailbox))
                except RequestError as error:
                    if len(listed) == 1:
                        raise
                    raise RequestError(f"prompt {place}: {error}") from None
            with self._lock:
                for request in requests:
                    loads = [
                        DEAD if driver.failure is not None else driver.load + len(mine)
                        for driver, mine in zip(drivers, replicas, strict=True)
                    ]
                    replicas[self._router.route(request.prompt_token_ids, loads)].append(request)
            call = Call(name, key, tuple(zip(drivers, map(tuple, replicas), strict=True)))
            for driver, mine in call.parts:
                if mine:
                    driver.submit(*mine)
        except BaseException:
            self._close_call(call)
            raise
        with self._lock:
            self._calls[name] = call
            aborted = key in self._aborted
        if aborted:
            call.abort()
        return call

    def _close_call(self, call: Call) -> None:
        """Ends what has not ended of a call that nobody follows any more."""
        call.abort()
        with self._lock:
            self._calls.pop(call.name, None)
            self._aborted.discard(call.key)

    def _request(
        self,
        driver: EngineDriver,
        prompt: Prompt,
        params: SamplingParams,
        name: str,
        place: int,
        seed: int,
        priority: int,
        mailbox: Mailbox,
    ) -> Request:
        request = new_request(
            prompt,
            params,
            name=name,
            place=place,
            tokenizer=self._tokenizer,
            eos_token_ids=self._tokenizer.eos_token_ids,
            seed=seed,
            priority=priority,
            mailbox=mailbox,
            now_s=time.perf_counter(),
        )
        try:
            driver.engine.check(request)
        except RequestError:
            request.tracks.clear()  # which name it in turn: nobody would free the two but the collector
            raise
        return request

    def close(self) -> None:
        """Ends all ranks and leaves nothing behind; calls that are open end with an error. Idempotent."""
        atexit.unregister(self.close)
        with ExitStack() as closing:
            for formation in self._formations:
                closing.callback(formation.close)
            for driver in self._drivers:
                closing.callback(driver.close)
        self._formations = []
        self._drivers = []


def checked_plan(config: Config, source: ModelSource, entries: Mapping[str, TensorEntry] | None = None) -> RunPlan:
    """The plan of a run, or everything that is known to stop it, before anything is started.

    entries: of the checkpoint, as far as they are known.
    """
    machine = this_machine()
    plan = plan_run(config, source.config, machine, entries)
    faults, _ = review(config, plan, source.config, machine)
    if faults:
        raise ConfigError([fault.problem for fault in faults], config.model.path)
    return plan


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt is a list of one: a text, or token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are texts or lists of token ids, found {prompts!r:.80}")
    listed: list[Any] = list(prompts)
    return [listed] if listed and all(isinstance(item, int) for item in listed) else listed
