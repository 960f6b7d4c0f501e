"""`token_places`: where the new tokens of a step stand, in their sequences and in the pages of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phalanx.kernels import native_cpu, triton_gpu
from phalanx.kernels.device_plan import DevicePlan
from phalanx.kernels.paged_attention import AttentionPlan


def token_places(
    page_tables: torch.Tensor,
    rows: Sequence[int],
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    *,
    page_size: int,
    device: torch.device,
    plan: AttentionPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, slots), [T] int64 each on `device`, of the last `query_lengths` tokens of sequences that have
    `context_lengths`, one sequence after another. slots: page * page_size + offset.

    page_tables [., P] int64 in main memory, its columns side by side; rows: which of them, for each sequence.
    plan: of attention of the same tokens, if there is one: what it has brought to a GPU is not brought again.
    """
    if isinstance(plan, DevicePlan):
        return planned_places(plan)
    places = torch.empty((2, sum(query_lengths)), dtype=torch.int64)
    fill_token_places(places, page_tables, rows, query_lengths, context_lengths, page_size=page_size)
    places = places.to(device)
    return places[0], places[1]


def planned_places(plan: DevicePlan) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, slots) of the tokens of a plan; anything at places that lack."""
    return triton_gpu.find_triton().operators.token_places(  # type: ignore[no-any-return]
        plan.sequences, plan.pages, plan.num_tokens, plan.most_new, plan.page_size
    )


def fill_token_places(
    places: torch.Tensor,
    page_tables: torch.Tensor,
    rows: Sequence[int],
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    *,
    page_size: int,
) -> None:
    """The same into places [2, T] int64, in main memory: positions, then slots."""
    if native_cpu.LIBRARY is not None:
        native_cpu.LIBRARY.token_places(
            places.data_ptr(),
            page_tables.data_ptr(),
            page_tables.stride(0),
            rows,
            query_lengths,
            context_lengths,
            page_size,
        )
        return
    positions = torch.cat(
        [torch.arange(length - count, length) for count, length in zip(query_lengths, context_lengths, strict=True)]
    )
    sequence = torch.repeat_interleave(torch.tensor(rows), torch.tensor(query_lengths))
    pages = page_tables[sequence, positions // page_size]
    torch.stack((positions, pages * page_size + positions % page_size), out=places)
