"""Has a model run steps, in turns looked at and not."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import PhalanxError
from phalanx.launcher.generate_output import await_reports
from phalanx.launcher.llm import LLM
from phalanx.launcher.trace import TracedRun

WARMUP_TOKENS = 4  # the first step of a kind is not recorded, the second is, the third is replayed


class ProfileOptions(NamedTuple):
    """batch: prompts at once, on each replica. num_rounds: whose prompts are looked at, and as many more. whole_rounds:
    whether a round is looked at from end to end or not at all.
    """

    num_prompt: int
    num_output: int
    batch: int
    num_rounds: int
    whole_rounds: bool = False
    seed: int = 0


class Profiled(NamedTuple):
    """What every rank did in steps that it looked at, and in others."""

    profiled: TracedRun
    plain: TracedRun


@dataclass(frozen=True)
class Turns:
    """Every second `length` steps from `first` on, with those first of all or not."""

    first: int
    length: int
    begins: bool

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int) or step < self.first:
            return False
        return ((step - self.first) // self.length % 2 == 0) == self.begins


def run_profile(llm: LLM, options: ProfileOptions, on_round: Callable[[str], None]) -> Profiled:
    """Steps are looked at in turns: what slows the machine down for a while slows both kinds. on_round: hears what
    begins. Raises PhalanxError where ranks do not tell of their steps.
    """
    draws = random.Random(options.seed)
    on_round("warm-up")
    for _ in range(2):
        _play(llm, options._replace(num_output=WARMUP_TOKENS), draws)
    # As many steps in a row as there are micro-batches; all of a round, where starting to look takes long.
    length = sys.maxsize if options.whole_rounds else len(llm.plan.layout.stages)
    profiled, plain = [], []
    for number in range(2 * options.num_rounds):
        on_round(f"round {number + 1} of {2 * options.num_rounds}")
        firsts = [stats.steps for stats in llm.replica_stats()]
        looked = [Turns(first, length, begins=number % 2 == 0) for first in firsts]
        llm.profile_steps(looked)
        _play(llm, options, draws)
        profiled.append(llm.traced(looked))
        plain.append(llm.traced([Turns(each.first, length, not each.begins) for each in looked]))
    return Profiled(TracedRun.together(profiled), TracedRun.together(plain))


def _play(llm: LLM, options: ProfileOptions, draws: random.Random) -> None:
    num_prompts = options.batch * len(llm.replica_stats())
    prompts = [draws.choices(range(llm.vocab_size), k=options.num_prompt) for _ in range(num_prompts)]
    llm.generate(prompts, SamplingParams(max_tokens=options.num_output, temperature=0.0, ignore_eos=True))
    if not await_reports(llm):
        raise PhalanxError("not all ranks have told of their steps in time; try fewer --output-tokens")
