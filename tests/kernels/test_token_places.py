"""Where new tokens stand, against a count by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phalanx.kernels import native_cpu, token_places


@pytest.mark.parametrize("native", [True, False])
@given(
    sequences=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=6),
    page_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_positions_and_slots(native: bool, sequences: list[tuple[int, int]], page_size: int, seed: int) -> None:
    new = [count for count, _ in sequences]
    lengths = [count + before for count, before in sequences]
    tables = torch.randint(100, (len(sequences) + 3, 31), generator=torch.Generator().manual_seed(seed))
    rows = torch.randperm(len(tables), generator=torch.Generator().manual_seed(seed))[: len(sequences)].tolist()
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(native_cpu, "LIBRARY", None)
        elif native_cpu.LIBRARY is None:
            pytest.skip("the native library is not built")
        positions, slots = token_places(tables, rows, new, lengths, page_size=page_size, device=torch.device("cpu"))
    expected = [
        (at, int(tables[row, at // page_size]) * page_size + at % page_size)
        for row, count, length in zip(rows, new, lengths, strict=True)
        for at in range(length - count, length)
    ]
    assert list(zip(positions.tolist(), slots.tolist(), strict=True)) == expected
