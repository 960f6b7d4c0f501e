"""What the engine and the ranks say to each other. Plain data, carried as msgpack; nothing here is ever pickled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from phalanx.models.checkpoint import TensorEntry
from phalanx.models.config import DecoderConfig
from phalanx.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class CommSettings:
    """How the ranks reach each other.

    backend: name of a registered communicator backend, or `auto`. store: `host:port` of the rendezvous store.
    interface: network interface whose address a rank binds to, or None for the route to the store.
    timeout_s: how long an operation may wait for another rank before it is an error.
    """

    store: str
    backend: str = "auto"
    interface: str | None = None
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class RankSpec:
    """All that a rank needs to know to start; it asks nobody else.

    rank: number inside its replica. engine: ZMQ address of the engine, `tcp://host:port`. secret: says that this rank
    belongs to this formation. dtype: of weights and activations. device: `cpu` or `cuda`. num_threads: compute threads.
    entries: where the tensors of the checkpoint lie, by canonical name. num_pages, page_size: KV cache, in pages and
    tokens a page.
    """

    replica: int
    rank: int
    layout: Layout
    config: DecoderConfig
    entries: dict[str, TensorEntry]
    dtype: str
    device: str
    num_threads: int
    num_pages: int
    page_size: int
    comm: CommSettings
    engine: str
    secret: str


class NewSequence(NamedTuple):
    """A sequence the ranks have not seen. The rest is what sampling needs; see `engine.sampling_params`."""

    sequence: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    logprobs: int


class SequenceWork(NamedTuple):
    """Tokens of one sequence to run in a step.

    tokens: ids at positions `start`, `start` + 1, ... pages: pages appended to the sequence's page table, before the
    step. sample: whether the token after the last of these is to be drawn.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    sample: bool


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What to compute in one step. dropped: sequences whose state the ranks forget, before the step."""

    step: int
    new: tuple[NewSequence, ...]
    work: tuple[SequenceWork, ...]
    dropped: tuple[int, ...]


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End of a formation: the rank releases what it holds and returns."""


class SampledToken(NamedTuple):
    """A drawn token, its log-probability where asked for, and the most likely tokens with theirs, best first."""

    sequence: int
    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Tokens drawn in a step, from the first rank of the last stage. busy_us: time from plan to tokens on that rank."""

    step: int
    tokens: tuple[SampledToken, ...]
    busy_us: float


class Progress(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How far a starting rank is. part: `imports`, `rendezvous`, `weights`, `warmup`. In bytes for `weights`."""

    rank: int
    part: str
    done: int
    total: int


class RankReady(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank that can serve. startup_s: seconds by part. weight_bytes: held; bytes_read: from the checkpoint's files.

    choices: what this rank chose among, the choice and why, for the start-up table.
    """

    rank: int
    node: str
    pid: int
    startup_s: dict[str, float]
    weight_bytes: int
    bytes_read: int
    kv_bytes: int
    choices: dict[str, str] = {}


class RankFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's own account of its failure. symptom: whether another rank's failure is the likely cause."""

    rank: int
    node: str
    message: str
    traceback: str
    symptom: bool


ToRank = StepPlan | Shutdown
ToEngine = StepResult | Progress | RankReady | RankFailed
