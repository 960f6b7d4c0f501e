"""Which query heads read which KV head, on a rank that may hold part of a group.

Shapes: T tokens of a step, N query heads and K KV heads of a rank, G query heads a KV head, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from phalanx.kernels import native_cpu

if TYPE_CHECKING:
    from phalanx._native import HeadLists


class HeadGroups(NamedTuple):
    """The query heads of each KV head, as a rectangle [K, G]; G is the largest group.

    head_of_place: [K * G] int64, the query head at each place, any head where the group has no more. place_of_head: [N]
    int64. Both are None where all groups are equal and in order, so that the rectangle is a view. native: the same for
    the native operator, None where that does not apply. table: [K, G] int32 for operators of GPUs, like head_of_place,
    but -1 where the group has no more.
    """

    num_kv_heads: int
    group_size: int
    head_of_place: torch.Tensor | None
    place_of_head: torch.Tensor | None
    native: HeadLists | None
    table: torch.Tensor | None

    def arrange(self, x_TND: torch.Tensor) -> torch.Tensor:
        """[T, N, D] -> [T, K * G, D]."""
        return x_TND if self.head_of_place is None else x_TND.index_select(1, self.head_of_place)

    def restore(self, x_TPD: torch.Tensor) -> torch.Tensor:
        """[T, K * G, D] -> [T, N, D]."""
        return x_TPD if self.place_of_head is None else x_TPD.index_select(1, self.place_of_head)


def group_heads(kv_of_query: Sequence[int], num_kv_heads: int, device: torch.device) -> HeadGroups:
    """kv_of_query: the KV head of each query head, below num_kv_heads."""
    native = native_cpu.LIBRARY.HeadLists(kv_of_query, num_kv_heads) if native_cpu.applies_on(device) else None
    groups = [[head for head, kv in enumerate(kv_of_query) if kv == group] for group in range(num_kv_heads)]
    size = max(map(len, groups))
    if [head for group in groups for head in group] == list(range(num_kv_heads * size)):
        return HeadGroups(num_kv_heads, size, None, None, native, None)
    rectangle = torch.tensor([group + [-1] * (size - len(group)) for group in groups], dtype=torch.int32, device=device)
    place_of_head = [kv * size + groups[kv].index(head) for head, kv in enumerate(kv_of_query)]
    return HeadGroups(
        num_kv_heads,
        size,
        rectangle.flatten().clamp(min=0).long(),
        torch.tensor(place_of_head, device=device),
        native,
        rectangle,
    )
