"""Signals that end a command the orderly way: what was started is stopped, then the process exits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
#: A process that was ended by signal N is said to exit with 128 + N.
_SIGNAL_BASE = 128


@contextmanager
def orderly_end() -> Iterator[Callable[[], None]]:
    """Inside, SIGTERM and SIGHUP unwind the stack as Ctrl-C does; the exit code is 128 plus the signal's number.

    Python drops what a signal handler raises while a finalizer or a callback of the import system happens to run. The
    function that is yielded raises it again; call it where nothing irreversible has begun yet.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    dropped: list[BaseException] = []

    def leave(number: int, _frame: FrameType | None) -> None:
        reason = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(_SIGNAL_BASE + number)
        dropped.append(reason)
        raise reason

    def end_if_asked() -> None:
        if dropped:
            raise dropped[0]

    numbers = [signal.SIGTERM, signal.SIGHUP]
    # Whoever started this in the background may have wanted Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield end_if_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
