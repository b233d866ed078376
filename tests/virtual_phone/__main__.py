"""One virtual phone: `python -m tests.virtual_phone ROOT [NAME=VALUE ...]` prints its port and serves until killed."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from tests.virtual_phone.adbd import Connection
from tests.virtual_phone.phone import Phone

#: The adb server looks for emulators on these by itself.
_EMULATORS = range(5555, 5586)
_WATCH_S = 0.05


def listen() -> socket.socket:
    """Return a listening socket on loopback."""
    while True:
        listener = socket.create_server(("127.0.0.1", 0))
        if listener.getsockname()[1] not in _EMULATORS:
            return listener
        listener.close()


def main(root: str, *properties: str) -> None:
    """Serve until killed."""
    phone = Phone(Path(root), dict(item.split("=", 1) for item in properties))
    listener = listen()
    port = listener.getsockname()[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    print(port, flush=True)
    connections: list[Connection] = []

    def accept(door: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = door.accept()
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections.append(Connection(phone, link))
                threading.Thread(target=connections[-1].serve, daemon=True).start()

    try:
        while True:
            threading.Thread(target=accept, args=(listener,), daemon=True).start()
            while not phone.asks_for_reboot():
                time.sleep(_WATCH_S)
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            while connections:
                connections.pop().close()
            time.sleep(phone.reboot())
            listener = socket.create_server(("127.0.0.1", port))
    finally:
        phone.kill_all()


if __name__ == "__main__":
    main(*sys.argv[1:])
