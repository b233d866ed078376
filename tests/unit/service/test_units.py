from __future__ import annotations

import pytest

from service.errors import InvalidRequest
from service.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1GB", 10**9),
        ("1.5 gb", 1_500_000_000),
        ("1GiB", 2**30),
        ("512MiB", 512 * 2**20),
        ("4096", 4096),
        ("0", 0),
        (" 2kB ", 2000),
        ("3 B", 3),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "1,5GB", "-1GB", "1e9", "1 GB or so", "1GB 2", "nan", "1GBit", "1  GB", "٣GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (1_553_808, "1.6 MB"),
        (2.5e12, "2500.0 GB"),
    ],
)
def test_sizes_are_written(size_bytes: float | None, text: str) -> None:
    assert format_bytes(size_bytes) == text
