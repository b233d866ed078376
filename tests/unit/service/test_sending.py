"""The sender of a file in pieces: how long it waits for a server that has all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from service import sending
from service.errors import ServiceUnavailable
from service.sending import LargeFile, send_file

PATIENCE_S = 60.0
STORED = {"state": "stored", "upload": {"sha256": "a"}}


class Clock:
    """Time that passes while somebody sleeps, and not otherwise."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sending, "time", clock)
    return clock


class Server:
    """One that has every byte, and tells what `tell` yields."""

    def __init__(self, tell: Iterator[Mapping[str, Any]]) -> None:
        self._tell = tell
        self.headers: dict[str, str] = {}

    def __call__(
        self, method: str, path: str, headers: Mapping[str, str], content: Iterable[bytes] | None = None
    ) -> Server:
        self._is_list = path.endswith("/resumable")
        return self

    def json(self) -> Any:
        document = {"id": "upl_1", "sha256": "a", "size_bytes": 1, "offset_bytes": 1, "upload": None, "error": None}
        if self._is_list:
            return {"uploads": [{**document, "state": "assembling"}]}
        return {**document, "state": "assembling", **next(self._tell)}


def send(server: Server, tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "model"
    path.write_bytes(b"x")
    return send_file(server, LargeFile(path, "a", 1), PATIENCE_S)


def test_a_server_that_does_nothing_with_the_pieces_is_given_up(clock: Clock, tmp_path: Path) -> None:
    def stand_still() -> Iterator[dict[str, Any]]:
        while True:
            yield {"assembled_until": None, "failed_tries": 0}

    with pytest.raises(ServiceUnavailable, match="nothing is sent twice"):
        send(Server(stand_still()), tmp_path)
    assert PATIENCE_S < clock.now_s < 2 * PATIENCE_S


def test_a_server_that_is_at_it_is_waited_for(clock: Clock, tmp_path: Path) -> None:
    def work() -> Iterator[dict[str, Any]]:
        while clock.now_s < 100 * PATIENCE_S:
            # A sign of life every ten seconds.
            yield {"assembled_until": clock.now_s // 10, "failed_tries": 0}
        yield STORED

    assert send(Server(work()), tmp_path) == STORED["upload"]


def test_one_that_only_fails_is_given_up_though_it_lives(clock: Clock, tmp_path: Path) -> None:
    def fail() -> Iterator[dict[str, Any]]:
        while True:
            yield {"assembled_until": clock.now_s // 10, "failed_tries": clock.now_s // 30}

    with pytest.raises(ServiceUnavailable):
        send(Server(fail()), tmp_path)
    assert clock.now_s < 4 * PATIENCE_S
