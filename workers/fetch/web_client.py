"""Requests to servers that a stranger named.

Owns the defence against requests that would reach into the worker's own network: a host's name is resolved once, its
addresses are judged before anything connects, and connections go to those very addresses, whatever the name resolves to
later; redirects are judged like the first address. No proxy, no cookie, no password of this machine is used, bodies are
never unpacked, and no message repeats a query. Called by `workers.fetch.https`, and by `hub` for what a
hub redirects to.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self
from urllib.parse import urljoin

import httpx2

from service.errors import CheckpointInvalid, EdgeKilnError, SourceForbidden, SourceNotFound, SourceUnavailable
from service.web_addresses import HostRules, Place, read_place
from workers.fetch.http_body import refuse_encoding

# These log whole addresses: a redirect's may hold a signature.
for _name in ("httpx2", "httpcore2"):
    logging.getLogger(_name).setLevel(logging.WARNING)

#: Seconds without a byte after which a connection counts as broken, and for making one.
TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10.0
#: Seconds that a small document may take as a whole.
SMALL_S = 60.0
MAX_REDIRECTS = 5
_HEADERS = {"User-Agent": "edgekiln", "Accept": "*/*", "Accept-Encoding": "identity"}
_ABSENT = (404, 410)
#: What servers without HEAD answer to it.
_NO_HEAD = (405, 501)
_TOTAL = re.compile(r"bytes 0-0/(\d+)")


class WebClient:
    """Opens addresses within `rules`; a context manager. May be used from several threads."""

    def __init__(self, rules: HostRules) -> None:
        self._rules = rules
        self._lock = threading.Lock()
        self._addresses: dict[Place, list[str]] = {}
        self._clients: dict[Place, httpx2.Client] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    @contextmanager
    def open(self, method: str, url: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx2.Response]:
        """Yield the answer after redirects, its body unread, whatever its status.

        Raises `SourceNotAllowed`, `SourceUnavailable` for a host without an address or a redirect to nowhere, and the
        HTTP library's `TransportError`.
        """
        for _ in range(MAX_REDIRECTS + 1):
            place = self._judge(url)
            response = self._send(method, url, place, headers or {})
            try:
                if not response.has_redirect_location:
                    yield response
                    return
                url = _join(url, response.headers["Location"])
            finally:
                response.close()
        raise SourceUnavailable(f"{place.host} redirects more than {MAX_REDIRECTS} times; check its server.")

    def read_small(self, url: str, limit_bytes: int) -> bytes | None:
        """Return a small document, or None where there is none; raises what `open_found` does, `CheckpointInvalid`."""
        with self.open_found("GET", url) as response:
            if response is None:
                return None
            refuse_encoding(response)
            data = bytearray()
            give_up_at = time.monotonic() + SMALL_S
            for chunk in response.iter_raw():
                data += chunk
                if len(data) > limit_bytes:
                    raise CheckpointInvalid(f"{url} has more than {limit_bytes} bytes.", limit_bytes=limit_bytes)
                if time.monotonic() > give_up_at:
                    raise SourceUnavailable(f"{url} comes too slowly; retry later.")
            return bytes(data)

    def ask(self, url: str) -> tuple[int, httpx2.Response] | None:
        """Return a file's size and the answer that states it, or None where there is no such file.

        The size is -1 where the server states none. Raises what `open_found` does.
        """
        for method, headers in (("HEAD", {}), ("GET", {"Range": "bytes=0-0"})):
            with self.open_found(method, url, headers, tolerated=_NO_HEAD) as response:
                if response is None:
                    return None
                size_bytes = _read_size(response) if response.is_success else None
                if size_bytes is not None or method == "GET":
                    return -1 if size_bytes is None else size_bytes, response
        raise AssertionError("the last method always answers")

    @contextmanager
    def open_found(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, tolerated: Sequence[int] = ()
    ) -> Iterator[httpx2.Response | None]:
        """Yield a good answer, or None where the server has no such file.

        Raises `SourceForbidden`, `SourceUnavailable` for a refusal that is not `tolerated`, and what `open` does, but
        for the HTTP library's errors, which become `SourceUnavailable`.
        """
        failure: EdgeKilnError
        try:
            with self.open(method, url, headers) as response:
                if response.status_code in _ABSENT:
                    yield None
                    return
                if response.status_code not in tolerated:
                    require_success(response, url)
                yield response
            return
        except httpx2.ConnectError as error:
            # Says what is wrong with a certificate; holds no address.
            failure = SourceUnavailable(f"{read_place(url).host} could not be reached: {error}.")
        except httpx2.TransportError as error:
            failure = SourceUnavailable(f"{url} broke off ({type(error).__name__}); retry later.")
        raise failure from None

    def _judge(self, url: str) -> Place:
        """Return where a URL leads, once its host and all its addresses are allowed."""
        try:
            place = read_place(url)
        except ValueError as error:
            raise SourceUnavailable(f"The server redirects to an address that cannot be used: {error}.") from None
        self._rules.require_host(place)
        with self._lock:
            if place not in self._addresses:
                self._addresses[place] = self._resolve(place)
            if place not in self._clients:
                self._clients[place] = httpx2.Client(
                    trust_env=False,
                    verify=httpx2.create_ssl_context(),
                    timeout=httpx2.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
                )
        return place

    def _resolve(self, place: Place) -> list[str]:
        try:
            found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise SourceUnavailable(f"The host {place.host} has no address; check its spelling.") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            self._rules.require_address(place, address)
        return addresses

    def _send(self, method: str, url: str, place: Place, headers: Mapping[str, str]) -> httpx2.Response:
        """Send a request to the first of the host's judged addresses that takes a connection."""
        client, addresses = self._clients[place], self._addresses[place]
        for address in list(addresses):
            request = client.build_request(
                method,
                httpx2.URL(url).copy_with(host=address, fragment=None),
                headers={**_HEADERS, **headers, "Host": place.netloc},
                # The certificate must be the name's, not the address's.
                extensions={"sni_hostname": place.host},
            )
            try:
                response = client.send(request, stream=True, follow_redirects=False)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if address == addresses[-1]:
                    raise
                continue
            client.cookies.clear()
            return response
        raise AssertionError("a host that was resolved has an address")


def _join(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise SourceUnavailable(f"{read_place(url).host} redirects to an address that cannot be used.") from None


def require_success(response: httpx2.Response, url: str) -> None:
    """Raise the typed error of a refusal."""
    status = response.status_code
    if response.is_success:
        return
    if status in _ABSENT:
        raise SourceNotFound(f"There is no {url} (HTTP {status}).", status=status)
    if status in (401, 403):
        raise SourceForbidden(
            f"{url} may not be read (HTTP {status}). Some servers answer so for files that are not there: then name "
            "those that are, as the source's `files`.",
            status=status,
        )
    raise SourceUnavailable(f"{url} could not be read (HTTP {status}); retry later.", status=status)


def _read_size(response: httpx2.Response) -> int | None:
    if response.status_code == httpx2.codes.PARTIAL_CONTENT:
        match = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
        return int(match[1]) if match else None
    stated = response.headers.get("Content-Length", "")
    return int(stated) if stated.isascii() and stated.isdigit() else None
