"""What the engine and the ranks say to each other. Plain data, carried as msgpack; nothing here is ever pickled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from phalanx.comm.ledger import CommTotals, LateTotals, LedgerEntry
from phalanx.engine.clock import ClockReading
from phalanx.engine.held_cores import NO_CORES, HeldCores
from phalanx.models.config import DecoderConfig
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class CommSettings:
    """How the ranks reach each other.

    backend: name of a registered communicator backend, or `auto`. store: `host:port` of the rendezvous store.
    interface: network interface whose address a rank binds to, or None for the route to the store.
    timeout_s: how long an operation may wait for another rank before it is an error. overlap: `none` for
    nothing behind compute; `chunks`, `parts` or `sequence` for that way of summing in every stage, `auto` for the one
    that is predicted to take the least time. compress: how hidden states travel
    between stages on different machines: `none`, `int8` or `fp8`.
    """

    store: str
    backend: str = "auto"
    interface: str | None = None
    timeout_s: float = 60.0
    overlap: str = "auto"
    compress: str = "none"


@dataclass(frozen=True, slots=True)
class KVMeasure:
    """How ranks find out how many pages they hold: as many as the tightest of them has room for.

    share: of the memory that is free once all are loaded and warm. device_part: of its GPU that is a rank's own; on a
    CPU the ranks of one machine divide what is free there. limit_pages: most that are taken. least_pages: fewer are an
    error. copies: replicas that may be on one machine.
    """

    share: float
    device_part: float
    limit_pages: int
    least_pages: int
    copies: int


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """How ranks look at steps. torch: PyTorch's profiler looks too, as always on a GPU; nothing recorded is replayed
    then. nsight: the steps are marked for Nsight, which is to record them; nobody else looks.
    """

    torch: bool = False
    nsight: bool = False


@dataclass(frozen=True, slots=True)
class RankSpec:
    """All that a rank needs to know to start; it asks nobody else.

    rank: number inside its replica. engine: ZMQ address of the engine, `tcp://host:port`. secret: says that this rank
    belongs to this formation. dtype: of weights and activations. device: `cpu` or `cuda`. num_threads: compute threads.
    entries: where the tensors of the checkpoint lie, by canonical name. num_pages, page_size: KV cache, in pages and
    tokens a page; `measure` says how many where `num_pages` is 0. max_sequences, max_batch_tokens: most slots, and most
    tokens of a step. max_length: most tokens of a sequence. trace: whether every step and transfer is handed over.
    cores: that the process is held to. cuda_graphs: whether a GPU's steps may be captured. torch_compile: whether
    PyTorch's operators are compiled. profile: how steps are profiled that ask for it, None where none does.
    quantization: of the weights, as `model.quantization`. kv_cache_dtype: as `engine.kv_cache_dtype`.
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
    max_sequences: int
    max_batch_tokens: int
    max_length: int
    comm: CommSettings
    engine: str
    secret: str
    measure: KVMeasure | None = None
    trace: bool = False
    cores: HeldCores = NO_CORES
    cuda_graphs: bool = True
    torch_compile: bool = False
    profile: ProfileSettings | None = None
    quantization: str = "none"
    kv_cache_dtype: str = "auto"


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the tokens of one sequence are drawn; see `engine.sampling_params` for what the first ones mean.

    top_k: 0 for all. logprobs, prompt_logprobs: most likely tokens to report a position, 0 for the token's own only, -1
    for none. num_prompt: tokens of the prompt; a penalty for presence or frequency counts those after it, one for
    repetition all. history: the tokens so far, where a penalty needs them, else empty. logit_bias: (token, bias).
    allowed: the only tokens that may be drawn, None for all. stop_tokens, min_tokens: the tokens that end the text may
    not be drawn before so many others were.
    """

    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logprobs: int = -1
    prompt_logprobs: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    num_prompt: int = 0
    history: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None
    stop_tokens: tuple[int, ...] = ()
    min_tokens: int = 0

    @property
    def plain(self) -> bool:
        """Whether the model's likeliest token is all that is wanted."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        ruled = self.logit_bias or self.allowed is not None or self.stop_tokens
        return self.temperature <= 0 and self.logprobs < 0 and penalties == (1, 0, 0) and not ruled


class NewSequence(NamedTuple):
    """A sequence that takes a slot: a row of every table that ranks keep. Whatever held the slot before is over.

    pages: the pages it begins with; some may hold keys and values already, of a prefix that others had too.
    """

    slot: int
    pages: tuple[int, ...]
    sampling: Sampling


class Chunk(NamedTuple):
    """Known tokens of one sequence to run in a step: a prompt, or a part of one.

    tokens: ids at positions `start`, `start` + 1, ... sample: whether the token after the last of these is to be drawn.
    following: that token where it is known, which only log-probabilities of the prompt ask for; else -1.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    sample: bool
    following: int = -1


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What to compute in one step. Ranks run plans in the order of their steps, whatever they hold of the results.

    new: sequences that take a slot, before the step. pages: (slot, page) appended to the slots' page tables, before the
    step. decodes: slots that run the token last drawn for them, at the position after those they ran. chunks: known
    tokens. masks: (slot, bits) of the tokens that may be drawn in this step: bit t % 8 of byte t // 8 for token t.
    profiled: whether ranks look at it, see `ProfileSettings`.

    Rows are the decodes, then the chunks. Drawn are a token for each decode, then for each chunk with `sample`.
    """

    step: int
    new: tuple[NewSequence, ...] = ()
    pages: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    masks: tuple[tuple[int, bytes], ...] = ()
    profiled: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def drawn_slots(self) -> tuple[int, ...]:
        """The slots that a token is drawn for, in that order."""
        return (*self.decodes, *[chunk.slot for chunk in self.chunks if chunk.sample])


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End of a formation: the rank releases what it holds and returns."""


class ClockAnswer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine's time to a `ClockAsk`: asked_s as it was asked, heard_s and answered_s on the engine's clock."""

    asked_s: float
    heard_s: float
    answered_s: float


class TokenLogprobs(NamedTuple):
    """Log-probability of a token, and the most likely tokens at its position with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Tokens drawn in a step, in the order that the plan says, from one rank of the last stage.

    logprobs: (place among the drawn, what was asked for) of the sequences that ask. prompt_logprobs: (place among the
    chunks, one a token of the prompt that is known after a token of the chunk).
    """

    step: int
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
    prompt_logprobs: tuple[tuple[int, tuple[TokenLogprobs, ...]], ...] = ()


class StageStep(NamedTuple):
    """When a stage worked on a step, in seconds of its machine's monotonic clock: from having the plan until its output
    was handed on or its tokens drawn. Time spent waiting for other stages lies before the start: waited_s of it.
    num_tokens: of the step; num_decodes of them one a sequence.
    """

    step: int
    started_s: float
    ended_s: float
    waited_s: float = 0.0
    num_tokens: int = 0
    num_decodes: int = 0

    def shifted(self, offset_s: float) -> StageStep:
        """The same on a clock that is so many seconds ahead."""
        return self._replace(started_s=self.started_s + offset_s, ended_s=self.ended_s + offset_s)


class StageReport(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a stage did lately, from its first rank. clock: of the steps."""

    stage: int
    steps: tuple[StageStep, ...]
    clock: ClockReading


class CommReport(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a rank's transfers took since its last report. last_step: the latest step that is in it. late: what this
    rank waited for others, by their numbers in the replica, as far as it knows whom it waited for. overlap: how sums
    are hidden now, and why, of the first rank of a stage where steps have moved the rates that were measured at the
    start.
    """

    rank: int
    last_step: int
    totals: tuple[CommTotals, ...]
    late: tuple[LateTotals, ...] = ()
    overlap: str = ""


class OperatorEntry(NamedTuple):
    """A call of an operator in a step. weight: name of the matrix that it multiplied by, or empty. sizes: that say
    something of it. num_bytes, num_flops: the least to be read and written, and to be calculated. started_s: on this
    rank's clock. taken_s: of a GPU the time of its kernels.
    """

    step: int
    operator: str
    weight: str
    sizes: tuple[int, ...]
    num_bytes: float
    num_flops: float
    started_s: float
    taken_s: float


class TorchEntry(NamedTuple):
    """Something that PyTorch's profiler saw: a call, or on a GPU a kernel. own_s: of a call without what it called, and
    where it launched kernels their time; 0 for parts of operators and transfers.
    """

    step: int
    name: str
    on_gpu: bool
    started_s: float
    taken_s: float
    own_s: float


class TraceReport(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Every step and transfer of a rank since its last report, on its own clock. groups: the ranks of each group, by
    their numbers in the replica; a rank's number in the group is its place among them. num_lost: transfers that are
    missing, because newer ones took their place. operators, torch: of the steps that were profiled.
    """

    rank: int
    steps: tuple[StageStep, ...]
    transfers: tuple[LedgerEntry, ...]
    clock: ClockReading
    groups: dict[str, tuple[int, ...]]
    num_lost: int
    operators: tuple[OperatorEntry, ...] = ()
    torch: tuple[TorchEntry, ...] = ()


class ClockAsk(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's question for the engine's time; asked_s: on its own clock."""

    asked_s: float


class Progress(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """How far a starting rank is. part: `imports`, `rendezvous`, `weights`, `compile`, `warmup`; bytes for weights."""

    rank: int
    part: str
    done: int
    total: int


class RankReady(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank that can serve. startup_s: seconds by part. weight_bytes: held; bytes_read: from the checkpoint's files.

    num_pages: pages of the KV cache. choices: what this rank chose among, the choice and why, for the start-up table.
    groups: as in `TraceReport`. link_bytes_per_s: of its network interface, 0 where that is not known. cores: as in
    `RankSpec`. memory: of a GPU, bytes by part (`memory_book.PARTS`) and what is free; together all of it. ceilings:
    bytes moved and operations calculated a second, as `kernels.ceilings` measures them beside the other ranks, of a
    rank that is to be profiled.
    """

    rank: int
    node: str
    pid: int
    startup_s: dict[str, float]
    weight_bytes: int
    bytes_read: int
    kv_bytes: int
    num_pages: int = 0
    choices: dict[str, str] = {}
    groups: dict[str, tuple[int, ...]] = {}
    link_bytes_per_s: float = 0.0
    cores: HeldCores = NO_CORES
    memory: dict[str, int] = {}
    ceilings: tuple[float, float] | None = None


class RankFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A rank's own account of its failure. symptom: whether another rank's failure is the likely cause."""

    rank: int
    node: str
    message: str
    traceback: str
    symptom: bool


ToRank = StepPlan | Shutdown
Report = StageReport | CommReport | TraceReport
"""What ranks say of their work; nothing waits for it."""
ToEngine = StepResult | Report | Progress | RankReady | RankFailed
