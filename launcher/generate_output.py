"""What `phalanx generate` prints: text as it comes, or JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from rich.console import Console

from phalanx.engine.request import Completion, RequestOutput
from phalanx.engine.sampling_params import SamplingParams
from phalanx.launcher.comm_view import CommUse, comm_table, comm_words
from phalanx.launcher.llm import LLM
from phalanx.launcher.served import Prompt

REPORTS_S = 2.0  # for what ranks tell of their last steps, a moment after they are idle


def print_as_text(llm: LLM, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> None:
    """Streams the first unfinished completion's text to standard output; the others follow in order."""
    started = time.perf_counter()
    order = [(index, completion) for index, each in enumerate(params) for completion in range(each.n)]
    pending: dict[tuple[int, int], list[str]] = {place: [] for place in order}
    finished: set[tuple[int, int]] = set()
    outputs: list[RequestOutput] = []
    shown = 0
    if len(order) > 1:
        _title(prompts, *order[shown])
    for event in llm.stream(prompts, params):
        if isinstance(event, RequestOutput):
            outputs.append(event)
            continue
        place = event.request, event.completion
        pending[place].append(event.text)
        if event.finish_reason is not None:
            finished.add(place)
        while shown < len(order):
            sys.stdout.write("".join(pending[order[shown]]))
            pending[order[shown]].clear()
            if order[shown] not in finished:
                break
            sys.stdout.write("\n")
            shown += 1
            if shown < len(order):
                _title(prompts, *order[shown])
        sys.stdout.flush()
    print(_figures(outputs, time.perf_counter() - started), file=sys.stderr)
    for use in _comm(llm):
        console = Console(stderr=True, highlight=False)
        console.print("communication", comm_table(use), *comm_words(use), sep="\n")


def _comm(llm: LLM) -> list[CommUse]:
    """What transfers took, by replica; nothing where there are none, or the ranks do not tell in time."""
    if not await_reports(llm):
        return []
    uses = [
        CommUse.of(totals, stats.steps, waits, llm.link_rates(replica), overlaps)
        for replica, (totals, stats, waits, overlaps) in enumerate(
            zip(llm.comm_totals(), llm.replica_stats(), llm.comm_waits(), llm.comm_overlaps(), strict=True)
        )
    ]
    return [use for use in uses if use.ops]


def await_reports(llm: LLM) -> bool:
    """Waits until all ranks have told what they did; False where they do not in time."""
    until_s = time.perf_counter() + REPORTS_S
    while not llm.all_is_told():
        if time.perf_counter() > until_s:
            return False
        time.sleep(0.01)
    return True


def print_as_json(llm: LLM, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> None:
    """One object a line for each prompt, in order, once it and those before it are finished; then a summary."""
    started = time.perf_counter()
    done: dict[int, RequestOutput] = {}
    shown = 0
    for event in llm.stream(prompts, params):
        if not isinstance(event, RequestOutput):
            continue
        done[event.request] = event
        while shown in done:
            _line(_as_data(done[shown]))
            shown += 1
    elapsed = time.perf_counter() - started
    outputs = list(done.values())
    _line(
        {
            "summary": {
                "startup_s": dict(llm.startup.startup_s),
                "layout": str(llm.plan.layout),
                "num_prompts": len(outputs),
                "output_tokens": _num_tokens(outputs),
                "elapsed_s": elapsed,
                "output_tokens_per_s": _num_tokens(outputs) / elapsed,
                "communication": [use.to_json() for use in _comm(llm)],
            }
        }
    )


def _as_data(output: RequestOutput) -> dict[str, Any]:
    """The first completion's fields stand beside the prompt; where there are several, `completions` has them all."""
    data: dict[str, Any] = {"prompt_token_ids": output.prompt_token_ids, **_completion(output.completions[0])}
    if output.prompt_logprobs is not None:
        data["prompt_logprobs"] = [each._asdict() for each in output.prompt_logprobs]
    if len(output.completions) > 1:
        data["completions"] = [_completion(each) for each in output.completions]
    return data


def _completion(completion: Completion) -> dict[str, Any]:
    data: dict[str, Any] = {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "timings": asdict(completion.timings),
    }
    if completion.logprobs is not None:
        data["logprobs"] = [each._asdict() for each in completion.logprobs]
    return data


def _line(data: Any) -> None:
    print(msgspec.json.encode(data).decode(), flush=True)


def _title(prompts: Sequence[Prompt], index: int, completion: int) -> None:
    prompt = prompts[index]
    words = " ".join(prompt.split()) if isinstance(prompt, str) else f"{len(prompt)} token ids"
    again = f", completion {completion + 1}" if completion else ""
    print(f"[{index + 1}/{len(prompts)}{again}] {words[:80]}", file=sys.stderr, flush=True)


def _figures(outputs: Sequence[RequestOutput], elapsed_s: float) -> str:
    first = min(output.timings.time_to_first_token_s for output in outputs)
    decoding = [output.timings.time_per_output_token_s for output in outputs if len(output.token_ids) > 1]
    text = f"{_num_tokens(outputs)} tokens in {elapsed_s:.2f} s ({_num_tokens(outputs) / elapsed_s:.1f} tokens/s)"
    text += f"; first token after {first * 1e3:.0f} ms"
    if decoding:
        text += f", then {sum(decoding) / len(decoding) * 1e3:.1f} ms a token"
    return text


def _num_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(completion.token_ids) for output in outputs for completion in output.completions)
