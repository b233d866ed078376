"""A proxy before an S3 server that answers wrongly: refusals, silence, lost connections, cut and altered bytes.

Which answer goes wrong, and how, is drawn from the seed, the method, the key and how often it was asked for: the same
requests meet the same faults, in whatever order they come. After a few faults an object is left alone, so that who
tries again succeeds in the end. Used by `test_faulty_store`.
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

#: What can happen to any request, to one that reads, and to one that writes.
_ANY = ("refused with 503", "refused with 500 after it was done", "no answer", "connection lost")
_READS = ("bytes cut", "bytes altered")
_WRITES = ("sent bytes altered",)
#: How often a request for one object goes wrong before all goes well.
_FAULTS_EACH = 2
#: Share of the requests that go wrong until then.
_SHARE = 0.5
_HOP_HEADERS = {"connection", "transfer-encoding", "expect", "keep-alive"}


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to `target`; counts the faults by kind."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: str, seed: int, prefix: str) -> None:
        """Only requests whose path begins with `prefix` are touched."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.seed = seed
        self.prefix = prefix
        self.faults: Counter[str] = Counter()
        self.is_over = threading.Event()
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def draw_fault(self, method: str, path: str) -> str | None:
        """Decide what happens to this request."""
        name = f"{method} {path.partition('?')[0]}"
        with self._lock:
            self._asked[name] += 1
            count = self._asked[name]
            chance = random.Random(f"{self.seed} {name} {count}")
            if not path.startswith(self.prefix) or count > _FAULTS_EACH or chance.random() > _SHARE:
                return None
            # Wrong bytes come as often as everything else together.
            special = {"GET": _READS, "PUT": _WRITES}.get(method, _ANY)
            fault = chance.choice(chance.choice((_ANY, special)))
            self.faults[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what is wanted here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        fault = self.server.draw_fault(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "refused with 503":
            self._answer(503, [], b"")
            return
        if fault == "no answer":
            self.server.is_over.wait(10)
            self._hang_up()
            return
        if fault == "connection lost":
            self._hang_up()
            return
        status, headers, answer = self._forward(alter(body) if fault == "sent bytes altered" else body)
        if fault == "refused with 500 after it was done":
            self._answer(500, [], b"")
        elif fault == "bytes altered" and status == 200:
            self._answer(status, headers, alter(answer))
        elif fault == "bytes cut" and status == 200:
            self._answer(status, headers, answer, sent=len(answer) // 2)
            self._hang_up()
        else:
            self._answer(status, headers, answer)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                # The host is signed as the client wrote it.
                if name.lower() not in _HOP_HEADERS:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP_HEADERS]
            return response.status, headers, response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, sent: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def alter(data: bytes) -> bytes:
    """Return as many bytes, one of them another."""
    if not data:
        return data
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@contextmanager
def faulty_proxy(target: str, seed: int, prefix: str) -> Iterator[FaultyProxy]:
    """Yield a running proxy."""
    with FaultyProxy(target, seed, prefix) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.is_over.set()
            proxy.shutdown()
            thread.join()
