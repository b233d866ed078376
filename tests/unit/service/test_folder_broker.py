"""The embedded broker: every message once and whole, whoever writes and reads at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

from service import folder_broker
from service.folder_broker import FolderChannel
from service.queue import Poker, make_app
from service.settings import load_settings


@contextmanager
def channel(data_dir: Path) -> Iterator[FolderChannel]:
    with make_app(load_settings({"data_dir": data_dir})).connection() as connection:
        yield connection.channel()


def poke(data_dir: Path, *classes: str) -> None:
    poker = Poker(make_app(load_settings({"data_dir": data_dir})))
    poker(classes)
    poker.close()


def test_a_poke_is_taken_once_by_whoever_reads_its_queue(tmp_path: Path) -> None:
    poke(tmp_path, "light", "convert")
    with channel(tmp_path) as reader, channel(tmp_path) as other:
        message = reader.basic_get("light", no_ack=True)
        assert message is not None
        assert message.headers["task"] == "step.run"
        assert other.basic_get("light", no_ack=True) is None
        assert other.basic_get("convert", no_ack=True) is not None


def test_messages_are_whole_and_delivered_once_under_contention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_broker, "_MOST_MESSAGES", 10_000)
    writers, each = 4, 50
    has_ended = threading.Event()

    def write(writer: int) -> None:
        with channel(tmp_path) as target:
            for number in range(each):
                target._put("light", {"id": writer * each + number, "filler": "x" * 50_000})

    def read() -> list[Any]:
        found = []
        with channel(tmp_path) as source:
            while True:
                is_last = has_ended.is_set()
                try:
                    found.append(source._get("light")["id"])
                except Empty:
                    if is_last:
                        return found

    with ThreadPoolExecutor(writers + 2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for writing in [pool.submit(write, writer) for writer in range(writers)]:
            writing.result()
        has_ended.set()
        found = [number for reading in readers for number in reading.result()]
    assert sorted(found) == list(range(writers * each))


def test_a_queue_that_nobody_reads_stops_growing(tmp_path: Path) -> None:
    with channel(tmp_path) as target:
        for number in range(300):
            target._put("device", {"id": number})
        assert target._size("device") == 100
        assert target._get("device")["id"] == 0, "the oldest stay"
        target._put("device", {"id": 300})
        assert target._size("device") == 100, "what was taken leaves room"
        target._put("light", {"id": 0})
        assert target._size("light") == 1, "each queue has its own"


def test_an_unreadable_message_is_dropped_and_the_next_one_read(tmp_path: Path) -> None:
    poke(tmp_path, "light")
    (tmp_path / "broker" / "light" / "0-empty").write_bytes(b"")
    with channel(tmp_path) as reader:
        assert reader.basic_get("light", no_ack=True) is not None
        assert reader.basic_get("light", no_ack=True) is None


def test_a_message_that_cannot_be_written_costs_its_sender_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Where the queue's folder should be stands a file, as good as a full disk.
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "light").write_text("")
    poke(tmp_path, "light")
    assert "could not poke light workers" in caplog.text
    poke(tmp_path, "convert")
    with channel(tmp_path) as reader:
        assert reader.basic_get("convert", no_ack=True) is not None
