"""Made-up steps that a rank takes at its start: to be warm, and to see what its largest steps take.

They are made of slots and pages that real sequences take again, and belong to step -1 or earlier.
"""

from __future__ import annotations

from collections.abc import Callable

from phalanx.engine.memory_book import ACTIVATIONS, STEP_ROWS, STEP_TOKENS, MemoryBook
from phalanx.engine.messages import Chunk, NewSequence, Sampling, StepPlan
from phalanx.models.captured import graph_places
from phalanx.models.decoder import Decoder

# Two steps of a made-up sequence take every path of a real one once, on every rank: a chunk of a prompt, then a token.
WARMUP = (
    StepPlan(step=-2, new=(NewSequence(0, (0,), Sampling()),), chunks=(Chunk(0, 0, (0, 0), sample=True),)),
    StepPlan(step=-1, decodes=(0,)),
)
TOKEN = WARMUP[1]
"""The next token of the sequence in slot 0."""


def prompt_step(num_tokens: int, page_size: int) -> StepPlan:
    """So many tokens of one sequence, in the first pages."""
    pages = tuple(range(-(-num_tokens // page_size)))
    return StepPlan(
        step=-1,
        new=(NewSequence(0, pages, Sampling()),),
        chunks=(Chunk(0, 0, (0,) * num_tokens, sample=True),),
    )


def drawing_step(num_sequences: int) -> StepPlan:
    """A token drawn for each of so many sequences, in the way that takes most memory. All write to the same page."""
    sampling = Sampling(temperature=1.0, top_p=0.9)
    slots = range(num_sequences)
    return StepPlan(
        step=-1,
        new=tuple(NewSequence(slot, (0,), sampling) for slot in slots),
        chunks=tuple(Chunk(slot, 0, (0,), sample=True) for slot in slots),
    )


def try_largest_steps(
    run: Callable[[StepPlan], object],
    decoder: Decoder,
    book: MemoryBook,
    *,
    most_tokens: int,
    page_size: int,
    num_sequences: int,
    captures: bool,
) -> None:
    """Runs them, so that the book has what they take beside weights and cache: every rank of the replica at once.

    most_tokens: of one sequence in a step, as far as there are pages. num_sequences: that tokens are drawn for in a
    step. captures: whether steps are captured in graphs. Where no parts of memory are told, only the longest is run.
    """
    prompts = [most_tokens // 8, most_tokens] if book.by_part and most_tokens >= 8 else [most_tokens]
    draws = [-(-num_sequences // 8), num_sequences] if book.by_part else []
    with decoder.shortened(1):  # the smaller ones say what fits, if the others do not
        for number in prompts:
            _try(run, prompt_step(number, page_size), book, number, STEP_TOKENS)
        for number in draws:
            _try(run, drawing_step(number), book, number, STEP_ROWS)
    if captures and book.by_part:
        decoder.forget_steps()
        held_bytes = book.held_bytes()
        run(TOKEN)  # as it is, into memory that all graphs know
        kept_bytes = book.held_bytes() - held_bytes
        run(TOKEN)  # captured
        places = graph_places(num_sequences)
        book.reserve_graphs(kept_bytes, len(places), places[-1])
    book.give_back()  # no step runs any more, which may not lose its graph
    decoder.forget_steps()


def _try(run: Callable[[StepPlan], object], plan: StepPlan, book: MemoryBook, number: int, setting: str) -> None:
    what = f"a first step of {plan.num_tokens} tokens, {len(plan.drawn_slots)} drawn"
    with book.during(what, ACTIVATIONS, setting), book.trying(number, setting):
        run(plan)
