from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.launcher.sizes import format_bytes, format_count, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1GiB", 1_073_741_824),
        ("80GB", 80_000_000_000),
        ("512 MiB", 536_870_912),
        ("1.5 KiB", 1536),
        ("4096", 4096),
        (4096, 4096),
        ("2tib", 2_199_023_255_552),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "1 gig", "-1GiB", "0", 0, -5, "1e9", "1,5GB", "0.1B", True, None, 1.5, "١GB", [1]]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@given(
    st.integers(1, 10**6), st.sampled_from(["KB", "MB", "GB", "TB"]), st.sampled_from([str.lower, str.upper, str.title])
)
def test_units_scale_by_powers_of_1000_in_any_case(number: int, unit: str, case: object) -> None:
    assert callable(case)
    assert parse_size(f"{number}{case(unit)}") == number * 1000 ** ("KMGT".index(unit[0]) + 1)


@given(st.integers(1, 10**18 - 1))
def test_a_number_of_bytes_means_itself(num_bytes: int) -> None:
    assert parse_size(num_bytes) == parse_size(str(num_bytes)) == num_bytes


@given(st.integers(1, 2**52))
def test_a_printed_size_reads_back_within_its_three_figures(num_bytes: int) -> None:
    assert parse_size(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=5.1e-3, abs=0.51)


@given(st.text())
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 1
    except ValueError as error:
        assert "size" in str(error)


def test_counts_are_printed_in_thousands_millions_and_thousand_millions() -> None:
    assert [format_count(n) for n in (999, 49_152, 134_515_008, 70_553_706_496)] == [
        "999",
        "49.2 k",
        "134.5 M",
        "70.6 B",
    ]
