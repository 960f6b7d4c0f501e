"""How one dimension of a tensor is divided over the ranks of a group."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple, Self

from phalanx.errors import LayoutError


class Interval(NamedTuple):
    """Elements `start` to `stop` (exclusive) of a dimension."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def scaled(self, factor: int) -> Interval:
        return Interval(self.start * factor, self.stop * factor)

    def intersection(self, other: Interval) -> Interval | None:
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Interval(start, stop) if start < stop else None

    def __str__(self) -> str:
        return f"{self.start}-{self.stop - 1}" if self.size > 1 else f"{self.start}"


class Transfer(NamedTuple):
    """Elements that part `source` of one split hands to part `target` of another."""

    source: int
    target: int
    interval: Interval


@dataclass(frozen=True, slots=True)
class Split:
    """A division of `size` elements into one interval a rank.

    size: elements of the dimension (heads, columns, vocabulary rows, ...).
    granule: cuts fall on multiples of this many elements; only the last granule may be shorter.
    intervals: one a rank, in order. They cover the dimension; neighbours overlap only in a split made by `covering`.
    """

    size: int
    granule: int
    intervals: tuple[Interval, ...]

    @classmethod
    def even(cls, size: int, parts: int, granule: int = 1) -> Self:
        """As equal as granules allow; the first parts take what is left over.

        Raises LayoutError where there are fewer granules than parts.
        """
        return cls.weighted(size, [1] * parts, granule)

    @classmethod
    def weighted(cls, size: int, weights: Sequence[float], granule: int = 1) -> Self:
        """Each part in proportion to its weight, within one granule of it wherever every part can have at least one.

        Granules are dealt by the largest remainder, ties to the first part. Raises LayoutError where there are fewer
        granules than parts, or a weight is not positive.
        """
        if not weights or any(not weight > 0 for weight in weights):
            raise LayoutError(f"a split needs at least one weight and each above 0, found {list(weights)}")
        if size < 1 or granule < 1:
            raise LayoutError(f"a split needs a size and a granule of at least 1, found {size} and {granule}")
        num_granules = -(-size // granule)
        if num_granules < len(weights):
            unit = "" if granule == 1 else f" granules of {granule}"
            raise LayoutError(
                f"{size} elements are {num_granules}{unit}, too few to give each of {len(weights)} parts one"
            )
        exact = [Fraction(weight) for weight in weights]
        total = sum(exact)
        shares = [num_granules * weight / total for weight in exact]
        counts = [max(1, int(share)) for share in shares]
        order = sorted(range(len(shares)), key=lambda part: (counts[part] - shares[part], part))
        spare = num_granules - sum(counts)
        for part in order[: max(spare, 0)]:
            counts[part] += 1
        while (
            sum(counts) > num_granules
        ):  # parts raised to their one granule took it from those with the most in excess
            part = max((p for p in range(len(counts)) if counts[p] > 1), key=lambda p: (counts[p] - shares[p], p))
            counts[part] -= 1
        bounds = [min(size, bound * granule) for bound in accumulate(counts, initial=0)]
        return cls._from_bounds(size, bounds, granule)

    @classmethod
    def explicit(cls, size: int, bounds: Sequence[int], granule: int = 1) -> Self:
        """Cut at given elements: `bounds` starts with 0, ends with `size`, rises, and falls on granules.

        Raises LayoutError otherwise.
        """
        rises = all(low < high for low, high in pairwise(bounds))
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != size or not rises:
            raise LayoutError(f"bounds must rise from 0 to {size}, found {list(bounds)}")
        crooked = [bound for bound in bounds[:-1] if bound % granule]
        if crooked:
            raise LayoutError(f"bounds must be multiples of the granule {granule}, found {crooked}")
        return cls._from_bounds(size, bounds, granule)

    @classmethod
    def _from_bounds(cls, size: int, bounds: Sequence[int], granule: int) -> Self:
        return cls(size, granule, tuple(Interval(low, high) for low, high in pairwise(bounds)))

    def covering(self, group: int) -> Split:
        """The split of whole groups of `group` elements that each part touches: KV heads under a split of query heads.

        A group on a border is held by both neighbours, so the intervals of the result may overlap.
        """
        if self.size % group:
            raise LayoutError(f"{self.size} elements do not form whole groups of {group}")
        touched = tuple(Interval(part.start // group, -(-part.stop // group)) for part in self.intervals)
        return Split(self.size // group, 1, touched)

    def scaled(self, factor: int) -> Split:
        """The same division counted in elements `factor` times smaller: heads to columns."""
        return Split(self.size * factor, self.granule * factor, tuple(part.scaled(factor) for part in self.intervals))

    @property
    def num_parts(self) -> int:
        return len(self.intervals)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements a rank holds."""
        return tuple(part.size for part in self.intervals)

    def __getitem__(self, rank: int) -> Interval:
        return self.intervals[rank]

    def owner(self, element: int) -> int:
        """The first rank that holds `element`."""
        if not 0 <= element < self.size:
            raise IndexError(f"element {element} of a dimension of {self.size}")
        return bisect_right([part.stop for part in self.intervals], element)

    def transfers(self, target: Split) -> Iterator[Transfer]:
        """What each part of this split hands to each part of `target`, so that every element is sent exactly once."""
        if self.size != target.size:
            raise LayoutError(f"a split of {self.size} elements cannot be handed to one of {target.size}")
        for source, held in enumerate(self.intervals):
            for part, wanted in enumerate(target.intervals):
                common = held.intersection(wanted)
                if common:
                    yield Transfer(source, part, common)
