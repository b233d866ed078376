from __future__ import annotations

import pytest

from service.errors import InvalidRequest
from service.units import format_bytes, format_span, parse_bytes, parse_span


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


@pytest.mark.parametrize(
    ("text", "span_s", "shown"),
    [("90s", 90, "90s"), ("30m", 1800, "30m"), ("6 h", 21600, "6h"), ("24H", 86400, "1d"), (" 14d", 1209600, "2w")],
)
def test_spans_of_time_are_read_and_written(text: str, span_s: int, shown: str) -> None:
    assert parse_span(text) == span_s
    assert format_span(span_s) == shown


@pytest.mark.parametrize("text", ["", "6", "h", "1.5h", "-1h", "6h30m", "6 hours", "٣h", "9" * 20 + "h"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a span of time"):
        parse_span(text)
