"""Which rank holds which part of a model: stages of a pipeline, and the splits inside each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from phalanx.errors import LayoutError
from phalanx.parallel.shape import ModelShape
from phalanx.parallel.split import Interval, Split

# Of the tokens that pass the layers, those that pass the head. Between prompts, of which one does, and what is drawn,
# which all do: with as much of the one as of the other.
HEAD_SHARE = 0.5
HEAD_GRANULE = 64  # vocabulary rows, of a rank's, by which a shared head is cut


@dataclass(frozen=True, slots=True)
class StageRequest:
    """What a user asks of one stage.

    num_ranks: tensor-parallel ranks. num_layers: layers, or None to balance. weights: one a rank, or None for even.
    node, accelerator: where its ranks must be placed (a node's address or name, a type of accelerator), or None.
    """

    num_ranks: int = 1
    num_layers: int | None = None
    weights: tuple[float, ...] | None = None
    node: str | None = None
    accelerator: str | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive layers held by a group of tensor-parallel ranks.

    layers: the layers it runs. query_heads, kv_heads, ffn, vocab: the split of each dimension over its ranks, in heads,
    columns and vocabulary rows. `kv_heads` may overlap: a KV head on a border between ranks is held by both.
    first, last: whether it carries the embedding, and the final norm and the language-model head. head: the vocabulary
    rows of the head that each rank multiplies by: `vocab` on the last stage, and some of these where it shares the head
    with the first stage, which has the others.
    """

    index: int
    layers: Interval
    query_heads: Split
    kv_heads: Split
    ffn: Split
    vocab: Split
    first: bool
    last: bool
    head: tuple[Interval, ...] = ()
    node: str | None = None
    accelerator: str | None = None

    @property
    def num_ranks(self) -> int:
        return self.query_heads.num_parts


class RankPlace(NamedTuple):
    """Where a rank stands. rank: number inside its replica, through all stages. tensor_rank: inside its stage."""

    replica: int
    rank: int
    stage: int
    tensor_rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} (replica {self.replica}, stage {self.stage}, tensor rank {self.tensor_rank})"


@dataclass(frozen=True, slots=True)
class Layout:
    """An ordered tuple of stages, times `replicas`. Nothing else in the system decides who holds what."""

    stages: tuple[Stage, ...]
    replicas: int = 1

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        return sum(stage.num_ranks for stage in self.stages)

    @property
    def shares_head(self) -> bool:
        """Whether the first stage makes a part of the last one's logits."""
        return len(self.stages) > 1 and bool(self.stages[0].head)

    def first_rank(self, stage: int) -> int:
        """Number, inside the replica, of the first rank of `stage`."""
        return sum(before.num_ranks for before in self.stages[:stage])

    def stage_ranks(self, stage: int) -> range:
        """Numbers, inside the replica, of the ranks of `stage`."""
        first = self.first_rank(stage)
        return range(first, first + self.stages[stage].num_ranks)

    def places(self, replica: int = 0) -> Iterator[RankPlace]:
        """The ranks of one replica in order."""
        for stage in self.stages:
            for tensor_rank, rank in enumerate(self.stage_ranks(stage.index)):
                yield RankPlace(replica, rank, stage.index, tensor_rank)

    def __str__(self) -> str:
        widths = "+".join(str(stage.num_ranks) for stage in self.stages)
        copies = f" x {self.replicas} replicas" if self.replicas > 1 else ""
        layers = "+".join(str(stage.layers.size) for stage in self.stages)
        plural = "" if self.num_ranks == 1 else "s"
        return f"{widths} rank{plural}, {layers} layers{copies}"


def build_layout(
    shape: ModelShape, requests: Sequence[StageRequest], replicas: int = 1, *, shares_head: bool = False
) -> Layout:
    """The layout of a model over the requested stages.

    Layers that no stage asked for are dealt so that the slowest stage, by the weights that a rank multiplies a token
    by, is as fast as can be. The language-model head counts by half: of prompts only the last token passes it.
    shares_head: whether the first stage and the last each have a part of it, which evens them out as far as layers do
    not; else the last has it.

    Raises LayoutError, with figures, where a division cannot be done.
    """
    if not requests:
        raise LayoutError("a layout needs at least one stage")
    if replicas < 1:
        raise LayoutError(f"a layout needs at least one replica, found {replicas}")
    if shares_head and (obstacle := head_obstacle(shape, requests)) is not None:
        raise LayoutError(f"the head cannot be shared: {obstacle}; set parallel.head to last, or to auto")
    layers = _deal_layers(shape, requests, shares_head=shares_head)
    stages: list[Stage] = []
    for index, (request, interval) in enumerate(zip(requests, layers, strict=True)):
        weights = _shares(request)
        if len(weights) != request.num_ranks:
            raise LayoutError(
                f"stage {index} has {request.num_ranks} ranks but {len(weights)} weights; give one a rank"
            )
        if request.num_ranks > shape.num_query_heads:
            raise LayoutError(
                f"stage {index} asks for {request.num_ranks} tensor-parallel ranks, but the model has "
                f"{shape.num_query_heads} query heads; use at most {shape.num_query_heads} ranks a stage and more "
                "stages"
            )
        query_heads = Split.weighted(shape.num_query_heads, weights)
        stages.append(
            Stage(
                index=index,
                layers=interval,
                query_heads=query_heads,
                kv_heads=query_heads.covering(shape.queries_per_kv_head),
                ffn=Split.weighted(shape.ffn_size, weights, _granule(shape.ffn_size, request.num_ranks)),
                vocab=Split.weighted(shape.vocab_size, weights, _granule(shape.vocab_size, request.num_ranks)),
                first=index == 0,
                last=index == len(requests) - 1,
                node=request.node,
                accelerator=request.accelerator,
            )
        )
    heads = {len(stages) - 1: stages[-1].vocab.intervals}
    if shares_head:
        heads = _shared_head(shape, stages[0], stages[-1])
    return Layout(tuple(replace(stage, head=heads.get(stage.index, ())) for stage in stages), replicas)


def head_obstacle(shape: ModelShape, requests: Sequence[StageRequest]) -> str | None:
    """Why the first and the last of these stages cannot share the head, as half a sentence; None where they can."""
    if len(requests) < 2:
        return "there is one stage"
    first, last = requests[0], requests[-1]
    if first.num_ranks != last.num_ranks or _shares(first) != _shares(last):
        return "the first stage and the last cut the vocabulary in other parts"
    vocab = Split.weighted(shape.vocab_size, _shares(last), _granule(shape.vocab_size, last.num_ranks))
    if min(vocab.sizes) <= HEAD_GRANULE:
        return f"a rank has {min(vocab.sizes)} vocabulary rows, which are shared by {HEAD_GRANULE}"
    return None


def head_weighs(shape: ModelShape, num_stages: int) -> float:
    """By how much of a stage's layers prompts and decoding differ, where one stage has the whole head."""
    return HEAD_SHARE * shape.head_params * num_stages / (shape.num_layers * shape.layer_params)


def _shares(request: StageRequest) -> tuple[float, ...]:
    return request.weights or (1.0,) * request.num_ranks


def _shared_head(shape: ModelShape, first: Stage, last: Stage) -> dict[int, tuple[Interval, ...]]:
    """The rows of each rank of both stages. The first stage's share makes both equal, as far as it can: by the weights
    that a drawn token is multiplied by.
    """
    lead = (last.layers.size - first.layers.size) * shape.layer_params / shape.head_params
    share = (1 + lead) / 2
    cuts = []
    for rows in last.vocab.intervals:
        most = (rows.size - 1) // HEAD_GRANULE
        cuts.append(rows.start + HEAD_GRANULE * min(most, max(1, round(rows.size * (1 - share) / HEAD_GRANULE))))
    parts = list(zip(last.vocab.intervals, cuts, strict=True))
    return {
        first.index: tuple(Interval(cut, rows.stop) for rows, cut in parts),
        last.index: tuple(Interval(rows.start, cut) for rows, cut in parts),
    }


def _granule(size: int, parts: int) -> int:
    """The widest granule up to 64 that wastes little: 64 columns keep rows of a shard aligned to a cache line."""
    granule = 64
    while granule > 1 and size < 4 * granule * parts:
        granule //= 2
    return granule


def _deal_layers(shape: ModelShape, requests: Sequence[StageRequest], *, shares_head: bool) -> list[Interval]:
    asked = [request.num_layers for request in requests]
    fixed = sum(count for count in asked if count is not None)
    open_stages = asked.count(None)
    spare = shape.num_layers - fixed
    if any(count is not None and count < 1 for count in asked):
        raise LayoutError(f"every stage needs at least one layer, found {asked}")
    if spare < open_stages or (spare and not open_stages):
        wanted = f"the stages ask for {fixed} layers" + (f" and {open_stages} more stages" if open_stages else "")
        raise LayoutError(
            f"{wanted}, but the model has {shape.num_layers}; the layers of all stages must add up to that"
        )
    counts = [count or 1 for count in asked]
    for _ in range(spare - open_stages):
        # A greedy deal is optimal here: each layer costs the same, and goes where the stage's time grows to the least.
        counts[
            min(
                (i for i, count in enumerate(asked) if count is None),
                key=lambda i: _stage_cost(shape, requests, counts, i, shares_head=shares_head),
            )
        ] += 1
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return [Interval(low, high) for low, high in pairwise(bounds)]


def _stage_cost(
    shape: ModelShape, requests: Sequence[StageRequest], counts: Sequence[int], stage: int, *, shares_head: bool
) -> float:
    """Weights that each rank of `stage` would multiply a token by, on average, with one more layer."""
    holders = (0, len(requests) - 1) if shares_head else (len(requests) - 1,)
    head = HEAD_SHARE * shape.head_params / len(holders) if stage in holders else 0
    return ((counts[stage] + 1) * shape.layer_params + head) / requests[stage].num_ranks
