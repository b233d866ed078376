"""Signals that end a command the orderly way: what was started is stopped, then the process exits."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
#: A process that was ended by signal N is said to exit with 128 + N.
_SIGNAL_BASE = 128


@contextmanager
def orderly_end() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP unwind the stack as Ctrl-C does; the exit code is 128 plus the signal's number."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(_SIGNAL_BASE + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
