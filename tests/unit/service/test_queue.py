"""Pokes: a broker that fails is not asked again at once, and nobody who pokes is harmed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from kombu.transport.redis import Transport

from service import queue
from service.queue import Poker, make_app
from service.settings import load_settings


class PlayedApp(Celery):  # type: ignore[misc]  # celery publishes no types
    """Sends to a list; `trouble` is met first."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.asked = 0
        self.trouble: Callable[[], None] = lambda: None

    def send_task(self, name: str, *, queue: str, **_: Any) -> None:
        self.asked += 1
        self.trouble()
        self.sent.append(queue)


def fail_with(error: Exception) -> Callable[[], None]:
    def trouble() -> None:
        raise error

    return trouble


@pytest.mark.parametrize(
    "error", [OperationalError("away"), ConnectionRefusedError(), RuntimeError("nobody foresaw this")]
)
def test_a_broker_that_fails_is_asked_once_and_then_left_alone_for_a_while(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    app = PlayedApp()
    poke = Poker(app)
    poke(["light"])
    poke.close()
    app.trouble = fail_with(error)
    poke(["fetch", "light", "convert"])
    poke.close()
    poke(["device"])
    poke.close()
    assert (app.sent, app.asked) == (["light"], 2)
    assert "could not poke fetch workers" in caplog.text

    app.trouble = lambda: None
    now_s += queue._QUIET_S
    poke(["fetch", "light"])
    poke.close()
    assert app.sent == ["light", "fetch", "light"]


def test_whoever_pokes_while_a_message_is_sent_waits_for_nothing_and_is_served_by_the_next() -> None:
    app = PlayedApp()
    gate, is_sending = threading.Event(), threading.Event()

    def hang() -> None:
        is_sending.set()
        assert gate.wait(30)

    app.trouble = hang
    poke = Poker(app)
    poke(["fetch"])
    assert is_sending.wait(30)
    for _ in range(20):
        poke(["fetch"])
    assert app.asked == 1
    gate.set()
    poke.close()
    assert app.sent == ["fetch", "fetch"]


def test_a_process_that_ends_sends_its_last_wake_ups_first() -> None:
    program = (
        "import time\n"
        "from service.queue import Poker\n"
        "class App:\n"
        "    def send_task(self, name, *, queue, **_):\n"
        "        time.sleep(0.2); print(queue, flush=True)\n"
        "Poker(App())(['fetch', 'light'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout.split() == ["fetch", "light"]


def test_a_redis_has_time_to_say_that_there_is_no_message() -> None:
    options = make_app(load_settings({"broker_url": "redis://127.0.0.1/0"})).conf.broker_transport_options
    assert options["socket_timeout"] > Transport.brpop_timeout
    assert "polling_interval" not in options, "it would take the place of that timeout"
