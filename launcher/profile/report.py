"""What a profile found, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from phalanx.engine.messages import ProfileSettings
from phalanx.kernels.ceilings import Ceilings
from phalanx.launcher.bench.report import config_facts, machine_facts
from phalanx.launcher.profile.account import OPERATOR, Phase, phases
from phalanx.launcher.profile.run import Profiled, ProfileOptions
from phalanx.launcher.served import Served
from phalanx.parallel.layout import RankPlace


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """command: as it can be typed elsewhere. config: what ran, and how. ceilings: of each rank, beside the others.
    phases: by phase, then rank.
    """

    command: str
    config: Mapping[str, Any]
    options: ProfileOptions
    looks: ProfileSettings
    ceilings: Mapping[RankPlace, Ceilings]
    phases: tuple[Phase, ...]

    @classmethod
    def of(
        cls, served: Served, command: str, options: ProfileOptions, looks: ProfileSettings, runs: Profiled
    ) -> ProfileReport:
        """To be made before the ranks end."""
        layout = served.plan.layout
        places = chain.from_iterable(layout.places(replica) for replica in range(layout.replicas))
        measured = [Ceilings(*(ready.ceilings or (0.0, 0.0))) for ready in served.startup.ranks]
        ceilings = dict(zip(places, measured, strict=True))
        found = phases(runs.profiled, runs.plain, ceilings, on_gpu=served.plan.device == "cuda")
        return cls(command, config_facts(served), options, looks, ceilings, tuple(found))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the phases that there are."""
        return tuple(dict.fromkeys(phase.name for phase in self.phases))

    def ranks(self, name: str) -> list[Phase]:
        """The phase of this name, of every rank."""
        return [phase for phase in self.phases if phase.name == name]

    def slowest(self, name: str) -> Phase:
        """Of the rank that the others wait for: whose operators take the longest."""
        return max(self.ranks(name), key=lambda phase: phase.sum_us(OPERATOR))

    def to_json(self) -> dict[str, Any]:
        """Plain data; names say the units."""
        return {
            "benchmark": "phalanx profile",
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": dict(self.config),
            "machine": machine_facts(),
            "options": self.options._asdict(),
            "torch_profiler": self.looks.torch or self.config["device"] == "cuda",
            "ceilings": {str(place): each._asdict() for place, each in self.ceilings.items()},
            "phases": [phase.to_json() for phase in self.phases],
        }
