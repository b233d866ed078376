from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from service.commands.interrupts import orderly_end


@pytest.fixture(autouse=True)
def _ctrl_c_counts() -> Iterator[None]:
    """Whoever runs the tests in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Finalized:
    """Interrupted while it is finalized, where Python drops whatever a signal handler raises."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)
        # The handler runs before the next few instructions.
        sum(range(1000))


def interrupt_itself(number: int) -> None:
    with orderly_end():
        os.kill(os.getpid(), number)
        raise AssertionError("nothing happened")


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_ends_the_block_at_once(number: int, expected: type[BaseException]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(expected) as caught:
        interrupt_itself(number)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 128 + number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_what_python_drops_is_raised_when_asked(
    number: int, expected: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    with orderly_end() as end_if_asked:
        end_if_asked()
        Finalized(number)
        assert [hook.exc_type for hook in dropped] == [expected], "Python has dropped it"
        with pytest.raises(expected):
            end_if_asked()


def test_ctrl_c_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with orderly_end() as end_if_asked:
            os.kill(os.getpid(), signal.SIGINT)
            end_if_asked()
    finally:
        signal.signal(signal.SIGINT, before)
