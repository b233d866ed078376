"""A log is shown while it grows, and nobody waits for whoever shows it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.kiln import wait_for
from workers import live_log
from workers.live_log import LiveLog


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_log, "INTERVAL_S", 0.01)


def test_news_are_shown_once_and_a_failure_is_only_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.txt"
    shown: list[tuple[str, int]] = []

    def show(text: str, size_bytes: int) -> None:
        shown.append((text, size_bytes))
        if len(shown) == 2:
            raise RuntimeError("the ledger is away")

    with LiveLog(path, show):
        wait_for(lambda: shown == [("", 0)], "that there is nothing yet is shown, too", 30)
        path.write_bytes(b"one\0\n")
        wait_for(lambda: len(shown) == 3, "what could not be shown is shown again", 30)
        path.write_bytes(b"one\0\ntwo\n")
        wait_for(lambda: shown[-1][1] == 9, "more", 30)
    assert shown == [("", 0), ("one\ufffd\n", 5), ("one\ufffd\n", 5), ("one\ufffd\ntwo\n", 9)]
    assert "cannot show the log: the ledger is away" in caplog.text


def test_a_ledger_that_hangs_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_log, "_JOIN_S", 0.01)
    hangs, gate = threading.Event(), threading.Event()

    def hang(_text: str, _size_bytes: int) -> None:
        hangs.set()
        gate.wait(30)

    with LiveLog(tmp_path / "log.txt", hang) as log:
        assert hangs.wait(30)
    assert log._thread.is_alive(), "the run has ended although its log is still being shown"
    gate.set()
