"""A rank's look at its own steps: the operators that it calls, and what PyTorch's profiler sees of them."""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from phalanx.engine.messages import OperatorEntry, ProfileSettings, StepPlan, TorchEntry
from phalanx.kernels.triton_gpu import operators_watched
from phalanx.kernels.watch import CallWatch, OperatorCall

MARK = "phalanx: step "


class Seen(NamedTuple):
    """Of steps that were looked at, on the rank's clock."""

    operators: tuple[OperatorEntry, ...] = ()
    torch: tuple[TorchEntry, ...] = ()


class StepProfiler:
    """Looks at the steps that are run within `step`. Used from one thread."""

    def __init__(self, settings: ProfileSettings, weights: Mapping[str, Any], device: torch.device) -> None:
        """weights: tensors, packed ones, and tuples of those of experts, by their names."""
        self._nsight = settings.nsight
        self._torch = not self._nsight and (settings.torch or device.type == "cuda")  # which alone times kernels
        self._weights = {
            each.data_ptr(): name
            for name, weight in weights.items()
            for each in (weight if isinstance(weight, tuple) else (weight,))
        }
        self._device = device
        self._watch = CallWatch()
        self._calls: list[tuple[int, OperatorCall]] = []  # each with its step
        self._profile: torch.profiler.profile | None = None  # PyTorch's, while it looks
        self._marked: dict[int, float] = {}  # by step: when it was marked, so that its clock can be told
        self._marked_for_nsight = False

    @contextmanager
    def step(self, plan: StepPlan) -> Iterator[None]:
        """Looks where the plan says so."""
        self._mark_for_nsight(self._nsight and plan.profiled)
        if not plan.profiled:
            yield
            return
        with ExitStack() as looking:
            if self._device.type == "cuda":
                looking.enter_context(operators_watched())
            if self._torch:
                if self._profile is None:
                    self._profile = self._started()
                self._marked[plan.step] = time.perf_counter()
                looking.enter_context(torch.profiler.record_function(f"{MARK}{plan.step}"))
            if not self._nsight:
                looking.enter_context(self._watch.watching())
            yield
        self._calls += [(plan.step, call) for call in self._watch.take()]

    def _mark_for_nsight(self, wanted: bool) -> None:
        """From the first step that is looked at to the next that is not: what Nsight records if it is told to."""
        if wanted == self._marked_for_nsight:
            return
        self._marked_for_nsight = wanted
        torch.cuda.synchronize(self._device)
        if wanted:
            torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
        else:
            torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]

    def take(self) -> Seen:
        """What was seen since the last time. PyTorch's profiler looks no further, until the next step."""
        calls, self._calls = self._calls, []
        events: list[_Event] = []
        if self._profile is not None:
            self._profile.stop()
            events = _events(self._profile, self._marked)
            self._profile = None
            self._marked.clear()
        ranges = _ranges(events, {call.work.operator for _, call in calls}) if self._device.type == "cuda" else {}
        return Seen(
            tuple(self._entry(step, call, ranges) for step, call in calls),
            tuple(event.entry for event in events),
        )

    def _started(self) -> torch.profiler.profile:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        profile = torch.profiler.profile(activities=activities)
        profile.start()
        return profile

    def _entry(self, step: int, call: OperatorCall, ranges: Mapping[str, deque[_Event]]) -> OperatorEntry:
        work, taken_s = call.work, call.ended_s - call.started_s
        if ranges.get(work.operator):
            taken_s = ranges[work.operator].popleft().on_gpu_s
        weight = self._weights.get(work.weight, "")
        counted = work.sizes, work.num_bytes, work.num_flops
        return OperatorEntry(step, work.operator, weight, *counted, call.started_s, taken_s)


class _Event(NamedTuple):
    """on_gpu_s: of the kernels that were launched within."""

    entry: TorchEntry
    on_gpu_s: float


def _events(profile: torch.profiler.profile, marked: Mapping[int, float]) -> list[_Event]:
    """What PyTorch's profiler has seen, on the rank's clock, which it does not know: by the marks of the steps."""
    found: Sequence[Any] = profile.events() or ()  # type: ignore[no-untyped-call]
    marks = [event for event in found if event.name.startswith(MARK) and event.device_type == DeviceType.CPU]
    began = sorted((event.time_range.start, int(event.name.removeprefix(MARK))) for event in marks)
    if not began:
        return []
    # Of all marks, each a moment late, the least late tells best.
    offset_s = min(start_us * 1e-6 - marked[step] for start_us, step in began)
    events = []
    for event in found:
        start_us, end_us = event.time_range.start, event.time_range.end
        step = began[max(0, bisect_right(began, (start_us, sys.maxsize)) - 1)][1]
        on_gpu = event.device_type != DeviceType.CPU
        counts = not on_gpu and not _is_part(event)
        own_us = (event.self_device_time_total or event.self_cpu_time_total) if counts else 0.0
        started_s, taken_s = start_us * 1e-6 - offset_s, (end_us - start_us) * 1e-6
        entry = TorchEntry(step, event.name, on_gpu, started_s, taken_s, own_us * 1e-6)
        events.append(_Event(entry, 0.0 if on_gpu else event.device_time_total * 1e-6))
    return events


def _is_part(event: Any) -> bool:
    """Of an operator or a transfer, which are ranges around what PyTorch does for them."""
    while (event := event.cpu_parent) is not None:
        if not event.name.startswith(("aten::", MARK)):
            return True
    return False


def _ranges(events: Sequence[_Event], operators: set[str]) -> dict[str, deque[_Event]]:
    """Those that operators were seen as, by name, in their order."""
    found: defaultdict[str, deque[_Event]] = defaultdict(deque)
    for event in sorted(events, key=lambda event: event.entry.started_s):
        if not event.entry.on_gpu and event.entry.name in operators:
            found[event.entry.name].append(event)
    return found
