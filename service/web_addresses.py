"""Which web addresses a source may name, and which of them a worker may connect to.

Owns the canonical form of a folder's URL, the operator's lists of hosts, and the judgement of IP addresses. Pure: names
are resolved by `workers.fetch.web_client`. Called by `service.requests`, `service.sources` and `workers.fetch`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from service.errors import SourceNotAllowed

MAX_URL_CHARACTERS = 2048

_PORTS = {"https": 443, "http": 80}
#: A DNS name whose last label is no number: a resolver would take `2130706433` and `0x7f.1` for addresses.
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"({_LABEL}\.)*(?!\d+$|0x[0-9a-f]*$){_LABEL}")
#: What RFC 3986 allows in a path.
_PATH = re.compile(r"/([A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_DOTS = re.compile(r"(^|/)(\.|%2e){1,2}(/|$)", re.IGNORECASE)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
#: A gateway of one's own network (RFC 8215), and IPv4 in its oldest wrapping: nothing public lies there.
_LOCAL_GATEWAYS = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("::/96"))


@dataclass(frozen=True)
class Place:
    """Where a URL leads, before its path: what is checked and connected to."""

    scheme: str
    #: A lower-case name, or an IP address without brackets.
    host: str
    port: int

    @property
    def names(self) -> frozenset[str]:
        """What an operator may call it."""
        return frozenset({self.host, f"{self.netloc_host}:{self.port}"})

    @property
    def netloc_host(self) -> str:
        """The host as a URL writes it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def netloc(self) -> str:
        """Host and port as a URL and a Host header write them."""
        return self.netloc_host if self.port == _PORTS[self.scheme] else f"{self.netloc_host}:{self.port}"


@dataclass(frozen=True)
class HostRules:
    """The operator's word on hosts."""

    #: The only ones that may be read, where there are any; `*.example.org` means every name below it.
    hosts: tuple[str, ...] = ()
    #: Those that may lie at addresses that are not public, and may be read over http: `name` or `name:port`.
    private_hosts: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> HostRules:
        """Read what `to_json` wrote."""
        return cls(tuple(document.get("hosts", ())), tuple(document.get("private_hosts", ())))

    def to_json(self) -> dict[str, list[str]]:
        """Return the form that a step is told."""
        return {"hosts": list(self.hosts), "private_hosts": list(self.private_hosts)}

    def is_private(self, place: Place) -> bool:
        """Tell whether the operator vouches for a host by name."""
        return not place.names.isdisjoint(name.lower() for name in self.private_hosts)

    def require_host(self, place: Place) -> None:
        """Raise `SourceNotAllowed` for a host, or a way to it, that the operator does not allow."""
        if self.is_private(place):
            return
        if place.scheme != "https":
            raise SourceNotAllowed(
                f"{place.netloc} would be read over http, where anybody on the way can change what is read; use https.",
                host=place.host,
            )
        if self.hosts and not any(_matches(pattern.lower(), place) for pattern in self.hosts):
            raise SourceNotAllowed(
                f"This server reads no checkpoints from {place.host}; it does from {', '.join(self.hosts)}. The "
                "operator allows more with EDGEKILN_SOURCE_HOSTS.",
                host=place.host,
            )

    def require_address(self, place: Place, address: str) -> None:
        """Raise `SourceNotAllowed` for an IP address of the host that is not public, unless the operator vouches."""
        if not (is_public(address) or self.is_private(place)):
            raise SourceNotAllowed(
                f"{place.host} lies at {address}, which is no public address. The operator allows such a host with "
                "EDGEKILN_PRIVATE_SOURCE_HOSTS.",
                host=place.host,
            )


def _matches(pattern: str, place: Place) -> bool:
    return pattern in place.names or (pattern.startswith("*.") and place.host.endswith(pattern[1:]))


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the public internet's, whatever it is wrapped in."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if not found.is_global or found.is_multicast or getattr(found, "is_site_local", False):
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return True
    if any(found in network for network in _LOCAL_GATEWAYS):
        return False
    return all(is_public(str(each)) for each in _unwrap(found))


def _unwrap(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that a gateway would forward to."""
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


def read_place(url: str) -> Place:
    """Return where an absolute URL leads; raises `ValueError` that says what is wrong with it, without repeating it."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url or len(url) > MAX_URL_CHARACTERS:
        raise ValueError(
            f"a URL has at most {MAX_URL_CHARACTERS} ASCII characters without blanks; write others percent-encoded, "
            "and a host in its xn-- form"
        )
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise ValueError(f"a URL of a source begins with https://, not {parts.scheme[:20]}:")
    if "@" in parts.netloc:
        raise ValueError("a URL of a source must not hold a user name or a password")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("the port in the URL is no port") from None
    return Place(parts.scheme, _read_host(parts.hostname or ""), _PORTS[parts.scheme] if port is None else port)


def _read_host(host: str) -> str:
    if ":" in host and "%" not in host:
        return str(ipaddress.IPv6Address(host))
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        if len(host) > 253 or not _NAME.fullmatch(host):
            raise ValueError(f"{host[:100]!r} is neither a host's name nor an IP address in its usual form") from None
    return host


def normalise_folder_url(url: str) -> str:
    """Return the one form of a folder's URL, which ends with a slash; raises `ValueError`."""
    place = read_place(url)
    parts = urlsplit(url)
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise ValueError("a URL of a source must not hold a query or a fragment: it would stand in jobs and manifests")
    path = parts.path if parts.path.endswith("/") else f"{parts.path}/"
    if not _PATH.fullmatch(path) or _DOTS.search(path) or "//" in path:
        raise ValueError("the path of a source's URL consists of names joined by /, percent-encoded where need be")
    return f"{place.scheme}://{place.netloc}{path}"
