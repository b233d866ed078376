"""A capped log keeps its first and its last words."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.sandbox.log import SHOWN_BYTES, CappedLog, read_end, read_tail


def write(path: Path, limit_bytes: int, pieces: list[bytes]) -> bytes:
    log = CappedLog(str(path), limit_bytes)
    for piece in pieces:
        log.write(piece)
    log.close()
    return path.read_bytes()


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_short_output_is_kept_whole(tmp_path: Path, size: int) -> None:
    text = bytes(range(100))
    pieces = [text[start : start + size] for start in range(0, 100, size)]
    assert write(tmp_path / "log", 100, pieces) == text


@pytest.mark.parametrize("size", [1, 3, 7, 300])
def test_long_output_loses_its_middle(tmp_path: Path, size: int) -> None:
    text = bytes(range(200)) + bytes(range(100))
    pieces = [text[start : start + size] for start in range(0, 300, size)]
    assert write(tmp_path / "log", 100, pieces) == text[:50] + b"\n... 200 bytes left out ...\n" + text[-50:]


def test_head_is_in_the_file_while_the_run_goes_on(tmp_path: Path) -> None:
    log = CappedLog(str(tmp_path / "log"), 100)
    log.write(b"started\n")
    assert (tmp_path / "log").read_bytes() == b"started\n"
    log.close()


def test_tail_is_bounded_and_survives_broken_text(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\n".join(b"line %d \xff" % index for index in range(1000)))
    lines = read_tail(path).splitlines()
    assert len(lines) == 20
    assert lines[-1] == "line 999 \ufffd"


def test_tail_of_no_log_is_empty(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "missing") == ""


@pytest.mark.parametrize("size", [1, 1000, SHOWN_BYTES, 3 * SHOWN_BYTES + 7])
@pytest.mark.parametrize("limit_bytes", [100, 4 * SHOWN_BYTES, 100 * SHOWN_BYTES])
def test_the_end_is_seen_while_the_log_grows_however_long_it_is(tmp_path: Path, size: int, limit_bytes: int) -> None:
    path = tmp_path / "log"
    assert read_end(path) == (b"", 0)
    log = CappedLog(str(path), limit_bytes)
    text = b""
    for number in range(5000 if size == 1 else 30):
        piece = bytes((number + place) % 251 for place in range(size))
        log.write(piece)
        text += piece
        if number % 7 == 0:
            assert read_end(path) == (text[-SHOWN_BYTES:], len(text))
    log.close()
