"""Pokes to a Redis that is away, silent, or well."""

from __future__ import annotations

import socket
import threading

import kombu.utils.functional
import pytest

from service import queue
from service.queue import Poker, make_app
from service.settings import load_settings
from tests.services import free_port, redis_url

PATIENCE_S = 30.0


def poke(url: str) -> None:
    """Poke, and wait until that is over; fail if it never is."""
    app = make_app(load_settings({"broker_url": url}))
    poke = Poker(app)
    poke(["light", "convert"])
    waiting = threading.Thread(target=poke.close, daemon=True)
    waiting.start()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive(), "a wake-up is still being sent"
    app.close()


def test_nobody_waits_for_a_redis_that_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(kombu.utils.functional, "sleep", pauses.append)
    poke(f"redis://127.0.0.1:{free_port()}/0")
    assert pauses == []
    assert "could not poke light workers" in caplog.text


def test_a_redis_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(queue, "_REDIS_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        poke(f"redis://127.0.0.1:{server.getsockname()[1]}/0")
    assert "could not poke light workers" in caplog.text


def test_a_redis_that_is_well_gets_one_message_a_class(caplog: pytest.LogCaptureFixture) -> None:
    with redis_url() as url:
        poke(url)
        assert "could not poke" not in caplog.text
        with make_app(load_settings({"broker_url": url})).connection() as connection:
            for name in ("light", "convert"):
                message = connection.channel().basic_get(name, no_ack=True)
                assert message is not None
                assert message.headers["task"] == "step.run"
