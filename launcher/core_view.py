"""Which rank is held to which cores, in a few words for the start-up table."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.engine.messages import RankReady
from phalanx.launcher.run_plan import Decision
from phalanx.launcher.topology import spans

MOST_NAMED = 4  # ranks; beyond, and on several machines, only what they have together is told


def core_decisions(replicas: Sequence[Sequence[RankReady]]) -> list[Decision]:
    """replicas: what the ranks of each reported. A row for each way in which machines have their ranks on cores."""
    machines: dict[str, list[tuple[str, RankReady]]] = {}
    for replica, ranks in enumerate(replicas):
        for ready in ranks:
            name = f"rank {ready.rank}" + (f" of replica {replica}" if len(replicas) > 1 else "")
            machines.setdefault(ready.node, []).append((name, ready))
    alone = len(machines) == 1
    rows: dict[tuple[str, str], list[str]] = {}
    for machine, here in machines.items():
        choice = _named(here) if alone and len(here) <= MOST_NAMED else _together([ready for _, ready in here])
        reason = "; ".join(dict.fromkeys(ready.cores.reason for _, ready in here))
        rows.setdefault((choice, reason), []).append(machine)
    return [
        Decision("cores", choice, reason if alone else f"{reason}; on {_machines(names)}")
        for (choice, reason), names in rows.items()
    ]


def _named(ranks: Sequence[tuple[str, RankReady]]) -> str:
    if not any(ready.cores.cpus for _, ready in ranks):
        return "any"
    return ", ".join(f"{name}: {_cores(ready)}" for name, ready in ranks)


def _cores(ready: RankReady) -> str:
    return spans(ready.cores.cpus) + _near(ready.cores.nodes) if ready.cores.cpus else "any"


def _together(ranks: Sequence[RankReady]) -> str:
    held = [ready.cores for ready in ranks if ready.cores.cpus]
    if not held:
        return "any"
    cpus = spans(cpu for cores in held for cpu in cores.cpus) + _near({node for cores in held for node in cores.nodes})
    others = f", {len(ranks) - len(held)} on any" if len(held) < len(ranks) else ""
    return f"{len(held)} ranks on {cpus}, {spans({len(cores.cpus) for cores in held})} each{others}"


def _near(nodes: Sequence[int] | set[int]) -> str:
    return f" (node{'s' if len(nodes) > 1 else ''} {spans(nodes)})" if nodes else ""


def _machines(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} machines"
