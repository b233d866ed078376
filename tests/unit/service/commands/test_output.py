from __future__ import annotations

import time

import pytest

from service.commands.output import format_time, print_table


def test_a_table_is_never_wider_than_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("path", "size"), [["/models/" + "x" * 200, "5.1 MB"], ["short", "1 B"]], right=("size",))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    # Nothing is lost: the path is folded, the number stands whole.
    assert "".join(line.split()[0] for line in lines[2:]).count("x") == 200
    assert any(line.endswith("5.1 MB") for line in lines)


def test_a_narrow_table_is_as_narrow_as_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [["1", "2"]])
    assert capsys.readouterr().out.splitlines() == ["a  b", "────", "1  2"]


def test_times_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert format_time("2026-11-21T20:30:59.123456+00:00") == "2026-11-22 05:30"
        assert format_time(None) == "-"
    finally:
        monkeypatch.undo()
        time.tzset()
