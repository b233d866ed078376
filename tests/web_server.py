"""A web server on the loopback, with a certificate of its own authority.

Owns files in memory, served as plain servers do (`HEAD`, `ETag`, `Last-Modified`, `Range` with `If-Range`), and what
tests make of single paths: a `Reply` of any form, or a function that writes to the connection itself.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import format_datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.http_threads import QuietHandler, bind, serving

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_LONG_AGO = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


@dataclass(frozen=True)
class Reply:
    """An answer in place of a file's."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


Act = Callable[["Handler"], None]


@dataclass
class Site:
    """What the server has; tests change it as they go."""

    files: dict[str, bytes] = field(default_factory=dict)
    #: Path -> what happens in place of sending its file.
    acts: dict[str, Reply | Act] = field(default_factory=dict)
    has_etag: bool = True
    has_modified: bool = True
    has_head: bool = True
    takes_ranges: bool = True
    #: A body breaks off after so many bytes.
    cut_after_bytes: int | None = None
    #: (method, path, Range, headers) of every request.
    requests: list[tuple[str, str, str | None, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, files: dict[str, bytes], folder: str = "/models/tiny/") -> None:
        """Add files to a folder."""
        self.files |= {folder + name: data for name, data in files.items()}


class Handler(QuietHandler):
    """One connection."""

    site: Site

    def answer(self) -> None:
        """Answer as the site says."""
        path = self.path
        with self.site.lock:
            self.site.requests.append((self.command, path, self.headers.get("Range"), dict(self.headers)))
        act = self.site.acts.get(path)
        if callable(act):
            self.close_connection = True
            with suppress(OSError):
                act(self)
        elif act is not None:
            self.send(act)
        elif self.command == "HEAD" and not self.site.has_head:
            self.send(Reply(405))
        elif path in self.site.files:
            self.send(self._read(self.site.files[path]))
        else:
            self.send(Reply(404, body=b"<html>nothing here</html>"))

    def _read(self, data: bytes) -> Reply:
        etag, modified = f'"{hashlib.md5(data).hexdigest()}"', format_datetime(_LONG_AGO, usegmt=True)
        headers = {"ETag": etag} if self.site.has_etag else {}
        headers |= {"Last-Modified": modified} if self.site.has_modified else {}
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if not asked or not self.site.takes_ranges or self.headers.get("If-Range", etag) not in (etag, modified):
            return Reply(200, headers, data)
        start, end = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{min(end, len(data)) - 1}/{len(data)}"
        return Reply(206, headers, data[start:end])

    def send(self, reply: Reply) -> None:
        """Send a whole answer, or what is left of it where bodies are cut."""
        self.send_response(reply.status)
        for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else reply.body
        if self.site.cut_after_bytes is not None and len(body) > self.site.cut_after_bytes:
            body = body[: self.site.cut_after_bytes]
            self.close_connection = True
        with suppress(OSError):
            self.wfile.write(body)


class WebServer:
    """A running server; `port` is on every loopback address of IPv4."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: where certificates are written; None serves plain http."""
        self.site = Site()
        self._http = bind(Handler, site=self.site)
        self.port = self._http.server_port
        #: What clients must trust.
        self.authority: Path | None = None
        if folder is not None:
            self.authority, key_file = write_certificate(folder, ["models.example", "localhost"])
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.authority, key_file)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)

    def serving(self) -> AbstractContextManager[None]:
        """Answer while the block runs."""
        return serving(self._http)


@contextmanager
def run_web_server(folder: Path | None) -> Iterator[WebServer]:
    """Run a server in a thread of this process."""
    server = WebServer(folder)
    with server.serving():
        yield server


def write_certificate(folder: Path, names: list[str]) -> tuple[Path, Path]:
    """Write a certificate that vouches for itself, and its key; return both files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "EdgeKiln tests")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))
        .not_valid_after(dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file
