"""What a run of `phalanx bench serve` found, as data."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp

from phalanx import __version__
from phalanx.launcher.bench.report import processor
from phalanx.launcher.machine import this_machine
from phalanx.serve.bench.points import KNEE, HttpReading, Point, falls_behind, notes, read_figures
from phalanx.serve.bench.sweep import SweepPlan, knee


@dataclass(frozen=True, slots=True)
class ServeReport:
    """command: as it can be typed elsewhere. server: what it says of itself. lengths: name of the file."""

    command: str
    server: Mapping[str, Any]
    plan: SweepPlan
    lengths: str | None
    points: Sequence[Point]

    @property
    def knee(self) -> Point | None:
        return knee(self.points, self.plan.limits)

    def to_json(self) -> dict[str, Any]:
        """Plain data; names say the units."""
        machine, found, source = this_machine(), self.knee, self.plan.source
        return {
            "benchmark": "phalanx bench serve",
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "server": dict(self.server),
            "client_machine": {
                "processor": processor(),
                "num_cores": machine.num_cores,
                "gpus": [gpu.name for gpu in machine.gpus],
                "phalanx": __version__,
                "python": platform.python_version(),
                "aiohttp": aiohttp.__version__,
            },
            "options": {
                "requests": self.plan.form._asdict(),
                "lengths": self.lengths or "W4",
                "scale": source.scale,
                "seed": source.seed,
                "vocab_size": source.vocab_size,
                "num_requests": self.plan.num_requests,
                "duration_s": self.plan.duration_s,
                "rates_per_s": list(self.plan.rates) or "swept",
                "limits": self.plan.limits._asdict(),
            },
            "knee": {"definition": KNEE, "rate_per_s": found and found.rate_per_s},
            "points": [self._point(point) for point in self.points],
        }

    def _point(self, point: Point) -> dict[str, Any]:
        client, late_s = point.client, [reading.late_s for reading in point.readings]
        served = point.served
        return {
            "rate_per_s": point.rate_per_s,
            "figures": read_figures(point, self.plan.limits)._asdict(),
            "falls_behind": falls_behind(point, self.plan.limits),
            "notes": notes(point),
            "elapsed_s": client.elapsed_s,
            "num_planned": point.num_planned,
            "num_served": len(served),
            "prompt_tokens": sum(request.num_prompt_tokens for request in served),
            "output_tokens": sum(len(request.token_s) for request in served),
            "failures": {
                kind: {"count": len(failures), "example": failures[0].message}
                for kind, failures in point.failures.items()
            },
            "client": {
                "cpu_share": client.cpu_share,
                "cpu_us_per_chunk": client.cpu_s * 1e6 / client.num_chunks if client.num_chunks else None,
                "most_late_s": max(late_s),
            },
            "requests": [_request(reading) for reading in point.readings],
        }


def _request(reading: HttpReading) -> dict[str, Any]:
    data: dict[str, Any] = {"arrival_s": reading.arrival_s, "sent_s": reading.sent_s}
    if reading.served is None:
        return data | {"failure": reading.failure and reading.failure.kind}
    return data | {
        "prompt_tokens": reading.served.num_prompt_tokens,
        "output_tokens": len(reading.served.token_s),
        "time_to_first_token_s": reading.served.time_to_first_token_s,
        "time_per_output_token_s": reading.served.time_per_output_token_s,
        "end_to_end_s": reading.served.token_s[-1] - reading.arrival_s,
    }
