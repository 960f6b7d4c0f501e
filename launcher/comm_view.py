"""What transfers between ranks took, as figures and as a table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from phalanx.engine.comm_book import RankTotals, Waits
from phalanx.launcher.link_rates import GroupLink

SMALLEST_GAP = 0.1  # of a step's exposed time, from which a rank is said to keep others waiting


@dataclass(frozen=True, slots=True)
class OpUse:
    """What one kind of operation took on a rank and in a step, in the mean over ranks.

    link_bytes_per_s: of the slowest link between machines that it uses, None where that is not known.
    achieved_bytes_per_s: of those that cross it, over all the time that the operations were under way: what they
    waited for ranks that came late, too.
    """

    op: str
    per_step: float
    bytes_per_step: float
    exposed_us_per_step: float
    hidden_us_per_step: float
    link_bytes_per_s: float | None = None
    achieved_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class CommUse:
    """Transfers of a replica over a number of steps, in microseconds and bytes of a step.

    ops: by operation. layers: number of each layer and what was exposed in it, in the mean over its ranks; -1 for what
    belongs to none. ranks: what each rank waited; who waits least is whom the others wait for.
    waits: for each rank what all others together waited for it, as far as they know for whom. overlaps: by the first
    rank of a stage how its sums are hidden, where that has changed since the start.
    """

    steps: int
    ops: tuple[OpUse, ...]
    layers: tuple[tuple[int, float], ...]
    ranks: tuple[tuple[int, float], ...]
    waits: tuple[tuple[int, float], ...] = ()
    overlaps: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(
        cls,
        totals: RankTotals,
        steps: int,
        waits: Waits | None = None,
        links: Mapping[str, GroupLink] | None = None,
        overlaps: Mapping[int, str] | None = None,
    ) -> CommUse:
        """totals, waits: of `steps` steps. links: by group. overlaps: as `CommBook.overlaps` tells them."""
        steps = max(1, steps)
        sums: dict[str, list[float]] = {}
        layers, ranks, layer_ranks = defaultdict[int, float](float), defaultdict[int, float](float), Counter[int]()
        for rank, found in totals.items():
            layer_ranks.update({each.layer for each in found})
            for each in found:
                values = sums.setdefault(each.op, [0.0] * 4)
                for place, value in enumerate(each[2:6]):
                    values[place] += value / steps / len(totals)
                layers[each.layer] += each.exposed_us / steps
                ranks[rank] += each.exposed_us / steps
        late = defaultdict[int, float](float)
        for mine in (waits or {}).values():
            for rank, waited_us in mine.items():
                late[rank] += waited_us / steps
        return cls(
            steps=steps,
            ops=tuple(OpUse(op, *values, *_over_link(op, totals, links or {})) for op, values in sums.items()),
            layers=tuple((layer, layers[layer] / layer_ranks[layer]) for layer in sorted(layers)),
            ranks=tuple(sorted(ranks.items())),
            waits=tuple(sorted(late.items())),
            overlaps=tuple((overlaps or {}).items()),
        )

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @property
    def exposed_us(self) -> float:
        """Of a step, in the mean over ranks."""
        return sum(use.exposed_us_per_step for use in self.ops)


def comm_table(use: CommUse) -> Table:
    """By operation; with what was achieved of the links between machines where their rates are known."""
    table = Table("of a step, mean of ranks", box=None)
    linked = any(each.link_bytes_per_s for each in use.ops)
    for name in ("times", "KB", "exposed, us", "hidden, us", *(["Mbit/s of the link's"] if linked else [])):
        table.add_column(name, justify="right")
    for each in use.ops:
        table.add_row(
            each.op,
            f"{each.per_step:.1f}",
            f"{each.bytes_per_step / 1e3:,.1f}",
            f"{each.exposed_us_per_step:,.0f}",
            f"{each.hidden_us_per_step:,.0f}",
            *([_link_words(each)] if linked else []),
        )
    return table


def _link_words(use: OpUse) -> str:
    if use.link_bytes_per_s is None or use.achieved_bytes_per_s is None:
        return ""
    return f"{use.achieved_bytes_per_s * 8 / 1e6:,.0f} of {use.link_bytes_per_s * 8 / 1e6:,.0f}"


def _over_link(op: str, totals: RankTotals, links: Mapping[str, GroupLink]) -> tuple[float, float] | tuple[None, None]:
    """The link's rate and what was achieved of it, in bytes a second."""
    crossing = [each for mine in totals.values() for each in mine if each.op == op and each.group in links]
    taken_s = sum(each.exposed_us + each.hidden_us for each in crossing) / 1e6
    num_bytes = sum(links[each.group].crossing_bytes(op, each.num_bytes) for each in crossing)
    if not num_bytes or not taken_s:
        return None, None
    return min(links[each.group].bytes_per_s for each in crossing), num_bytes / taken_s


def comm_words(use: CommUse) -> Sequence[str]:
    """What the table does not show."""
    words = []
    layers = [(exposed_us, layer) for layer, exposed_us in use.layers if layer >= 0]
    if layers:
        least, most = min(layers), max(layers)
        mean_us = sum(exposed_us for exposed_us, _ in layers) / len(layers)
        words.append(
            f"exposed in a layer: {mean_us:,.0f} us; least {least[0]:,.0f} in layer {least[1]}, most {most[0]:,.0f} in "
            f"layer {most[1]}"
        )
    late = sorted(((waited_us, rank) for rank, waited_us in use.waits), reverse=True)
    waits = sorted((waited_us, rank) for rank, waited_us in use.ranks)
    if late:
        if late[0][0] - (late[1][0] if len(late) > 1 else 0.0) > SMALLEST_GAP * sum(waited for waited, _ in waits):
            words.append(
                f"the slowest is rank {late[0][1]}: the others together waited {late[0][0]:,.0f} us a step for it, "
                f"{sum(waited for waited, _ in waits):,.0f} for all"
            )
    elif len(waits) > 1 and waits[1][0] - waits[0][0] > SMALLEST_GAP * use.exposed_us:
        words.append(
            f"the others waited for rank {waits[0][1]}: it waited {waits[0][0]:,.0f} us a step itself, they "
            f"{waits[1][0]:,.0f} to {waits[-1][0]:,.0f}"
        )
    return [*words, *(f"overlap in the stage of rank {rank} now: {told}" for rank, told in use.overlaps)]
