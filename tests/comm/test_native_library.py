from __future__ import annotations

import pytest
from tests.native_library import excuse_for_no_library

from phalanx.native import find_native


def test_the_library_is_there_where_it_can_be_built() -> None:
    native = find_native()
    if native.library is None and (excuse := excuse_for_no_library()):
        pytest.skip(f"{native.told}: {excuse}")
    assert native.library is not None, native.told
    assert native.library.instruction_sets[-1] == "plain"
