# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them: what each means, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frozen_peft.utils.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (0, 0),
        (512, 512),
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1 kB", 1000),
        ("1KiB", 1024),
        ("300 MiB", 314_572_800),
        ("8GiB", 8_589_934_592),
        ("8gib", 8_589_934_592),
        (" 8 GIB ", 8_589_934_592),
        ("1.5 GB", 1_500_000_000),
        ("0.1GB", 100_000_000),
        ("2TiB", 2_199_023_255_552),
        ("2 TB", 2_000_000_000_000),
        ("0.3KiB", 307),
        ("123456789012345678", 123_456_789_012_345_678),
    ],
)
def test_sizes_parse(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "GiB", "-1", "-8GiB", "+8GiB", "8 gigs", "8G", "8Gi", "8iB", "8  GiB", "8GiB extra", "1.5", "1.5B",
     ".5GiB", "1.GiB", "1,5GiB", "1_000", "1e9", "0x10", "nan", "nanGiB", "inf", "infGB", "٣GiB", "8PiB", "9" * 5000,
     -1, True, 8.0, None],
)  # fmt: skip
def test_nonsense_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not a size.*such as '8GiB'"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 * 1024, "10 KiB"),
        (1024**3 - 1, "1024 MiB"),
        (8 * 1024**3, "8 GiB"),
        (5000 * 1024**4, "5000 TiB"),
    ],
)
def test_sizes_are_written_in_the_largest_unit(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@given(st.integers(0, 1023), st.integers(0, 4))
def test_whole_units_come_back_exactly(number: int, power: int) -> None:
    assert parse_size(format_size(number * 1024**power)) == number * 1024**power


@given(st.integers(0, 2**60))
def test_what_is_written_parses_to_half_a_hundredth_of_its_unit(num_bytes: int) -> None:
    text = format_size(num_bytes)
    unit = parse_size(f"1 {text.split()[1]}")
    assert abs(parse_size(text) - num_bytes) <= 0.005 * unit + 1


def refusal(text: str) -> str:
    """The message with which a text is refused, empty where it is a size."""
    try:
        parse_size(text)
    except ValueError as error:
        return str(error)
    return ""


@given(st.text(), st.from_regex(r" ?[0-9]{0,30}[.,]?[0-9]{0,3} ?[kmgtKMGT]?[iI]?[bB]?", fullmatch=True))
def test_any_text_is_a_size_or_refused_with_an_example(anything: str, similar: str) -> None:
    for text in (anything, similar):
        message = refusal(text)
        assert ("such as '8GiB'" in message) if message else parse_size(text) >= 0
