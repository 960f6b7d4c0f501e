"""A trace of all ranks on one clock, as Chrome's tracing and Perfetto (ui.perfetto.dev) read it.

The format is the Trace Event Format of catapult: complete events, and the names of processes and threads as metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from phalanx.comm.ledger import LedgerEntry
from phalanx.engine.trace_book import RankTrace
from phalanx.launcher.trace import Arrival, Key, TracedRank, TracedRun, arrivals, key_of

Event = dict[str, Any]

STEPS = 1  # the track of a rank's steps; those of its transfers follow


def write_trace(run: TracedRun, path: Path) -> None:
    path.write_text(json.dumps(trace_data(run)) + "\n")


def trace_data(run: TracedRun) -> Event:
    """The trace as plain data: a process a rank, a track for its steps and one or more for each of its groups.

    A transfer's `args` say what the ledger does, who arrived last, and how much later than this rank. `otherData` says
    how far each rank's clock was off and by how much that may be wrong, in microseconds.
    """
    times = [step.started_s * 1e6 for _, trace in run.ranks for step in trace.steps]
    times += [entry.started_us for _, trace in run.ranks for entry in trace.transfers]
    zero_us = min(times, default=0.0)
    events: list[Event] = []
    for replica in run.replicas:
        arrived = arrivals(replica)
        for rank in replica:
            events += _rank_events(rank, len(replica), arrived, zero_us)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"ranks": [_facts(rank) for rank in run.ranks]},
    }


def _facts(rank: TracedRank) -> Event:
    clock = rank.trace.clock
    return {
        "rank": str(rank.place),
        "clock_offset_us": clock.offset_s * 1e6,
        "clock_error_us": clock.error_s * 1e6,
        "transfers_lost": rank.trace.num_lost,
    }


def _rank_events(rank: TracedRank, num_ranks: int, arrived: Mapping[Key, Arrival], zero_us: float) -> Iterator[Event]:
    place, trace = rank
    pid = place.replica * num_ranks + place.rank

    def named(kind: str, name: str, tid: int = 0) -> Event:
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

    yield named("process_name", str(place))
    labels = f"clock within {trace.clock.error_s * 1e6:.0f} us"
    yield {"ph": "M", "name": "process_labels", "pid": pid, "args": {"labels": labels}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    yield named("thread_name", "steps", STEPS)
    for step in trace.steps:
        yield {
            "ph": "X",
            "name": f"step {step.step}",
            "cat": "step",
            "pid": pid,
            "tid": STEPS,
            "ts": round(step.started_s * 1e6 - zero_us, 3),
            "dur": round((step.ended_s - step.started_s) * 1e6, 3),
            "args": {"step": step.step, "tokens": step.num_tokens, "decodes": step.num_decodes},
        }
    tid = STEPS
    for group in sorted({entry.group for entry in trace.transfers}):
        for lane in lanes(entry for entry in trace.transfers if entry.group == group):
            tid += 1
            yield named("thread_name", f"transfers of {group}", tid)
            for entry in lane:
                yield {
                    "ph": "X",
                    "name": entry.op,
                    "cat": "transfer",
                    "pid": pid,
                    "tid": tid,
                    "ts": round(entry.started_us - zero_us, 3),
                    "dur": round(entry.total_us, 3),
                    "args": _transfer_args(rank, entry, arrived),
                }
    for name, events in (
        ("operators", _operators(trace)),
        ("PyTorch", _torch(trace, False)),
        ("GPU", _torch(trace, True)),
    ):
        if events:
            tid += 1
            yield named("thread_name", name, tid)
            for event in events:
                yield {"ph": "X", "pid": pid, "tid": tid, **event, "ts": round(event["ts"] - zero_us, 3)}


def _operators(trace: RankTrace) -> list[Event]:
    return [
        {
            "name": f"{entry.operator} {entry.weight}".strip(),
            "cat": "operator",
            "ts": entry.started_s * 1e6,
            "dur": round(entry.taken_s * 1e6, 3),
            "args": {"step": entry.step, "sizes": entry.sizes, "bytes": entry.num_bytes, "flops": entry.num_flops},
        }
        for entry in trace.operators
    ]


def _torch(trace: RankTrace, on_gpu: bool) -> list[Event]:
    return [
        {
            "name": entry.name,
            "cat": "kernel" if on_gpu else "torch",
            "ts": entry.started_s * 1e6,
            "dur": round(entry.taken_s * 1e6, 3),
            "args": {"step": entry.step},
        }
        for entry in trace.torch
        if entry.on_gpu == on_gpu
    ]


def _transfer_args(rank: TracedRank, entry: LedgerEntry, arrived: Mapping[Key, Arrival]) -> Event:
    groups = rank.trace.groups
    args: Event = {
        "seq": entry.seq,
        "group": entry.group,
        "layer": entry.layer,
        "step": entry.step,
        "bytes": entry.num_bytes,
        "exposed_us": round(entry.waited_us, 3),
        "hidden_us": round(entry.hidden_us, 3),
    }
    key = key_of(entry, rank.place.rank, groups)
    if key is None:
        return args
    if entry.peer >= 0:
        args["with_rank"] = groups[entry.group][entry.peer]
    arrival = arrived.get(key)
    if arrival is not None and arrival.last is not None:
        args["last_rank"] = arrival.last
        args["last_came_us_later"] = round(max(0.0, arrival.began_us - entry.started_us), 3)
    return args


def lanes(entries: Iterable[LedgerEntry]) -> list[list[LedgerEntry]]:
    """As few lists as it takes for none to have two that were under way at once: what a track can show."""
    made: list[list[LedgerEntry]] = []
    for entry in sorted(entries, key=lambda each: each.started_us):
        for lane in made:
            if lane[-1].started_us + lane[-1].total_us <= entry.started_us:
                lane.append(entry)
                break
        else:
            made.append([entry])
    return made
