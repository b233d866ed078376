"""How the processes of the sandbox talk: JSON documents over a Unix packet socket.

Owns the framing and nothing else. A document larger than one packet is cut into several; the first byte of
each says whether more follow. Used by `parent`, `zygote` and `supervisor`.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

#: Payload of one packet: below the default socket buffer, so that a packet always fits.
PACKET_BYTES = 64 * 1024
_MORE = b"+"
_LAST = b"."


def open_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a packet socket; neither survives an exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_document(
    end: socket.socket, document: Mapping[str, Any], fds: Sequence[int] = (), *, wait: bool = True
) -> bool:
    """Send one document, with file descriptors beside it; return False if `wait` is off and there is no room.

    Raises `OSError` when the other end is gone. Without `wait` a document must fit into one packet.
    """
    body = json.dumps(document).encode()
    pieces = [body[start : start + PACKET_BYTES] for start in range(0, len(body), PACKET_BYTES)]
    flags = 0 if wait else socket.MSG_DONTWAIT
    if not wait and len(pieces) > 1:
        raise ValueError(f"A document of {len(body)} bytes does not fit into one packet.")
    for index, piece in enumerate(pieces):
        is_last = index == len(pieces) - 1
        try:
            socket.send_fds(end, [_LAST if is_last else _MORE, piece], list(fds) if is_last else [], flags)
        except BlockingIOError:
            return False
    return True


class DocumentReader:
    """Puts the packets of one socket end together again."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._pieces: list[bytes] = []
        #: Descriptors that came with the last document; the caller owns and closes them.
        self.fds: list[int] = []

    def read_packet(self) -> dict[str, Any] | None:
        """Receive one packet; return the document it completes, None while more packets must come.

        Raises `EOFError` when the other end is closed.
        """
        try:
            packet, fds = self._receive()
        except ConnectionResetError:
            # The other end closed without reading our last words. Linux reports that once, ahead of what the
            # other end had said before.
            packet, fds = self._receive()
        if not packet:
            raise EOFError("the other end is closed")
        self.fds = fds
        self._pieces.append(packet[1:])
        if packet[:1] == _MORE:
            return None
        body, self._pieces = b"".join(self._pieces), []
        document = json.loads(body)
        if not isinstance(document, dict):
            raise ValueError("a packet that is no document")
        return document

    def _receive(self) -> tuple[bytes, list[int]]:
        packet, fds, _, _ = socket.recv_fds(self._end, PACKET_BYTES + 1, 4, socket.MSG_CMSG_CLOEXEC)
        return packet, fds

    def read_document(self) -> dict[str, Any]:
        """Block until a whole document is here; raise `EOFError` when the other end is closed."""
        while (document := self.read_packet()) is None:
            pass
        return document

    def close_fds(self) -> None:
        """Close the descriptors that came with the last document."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []
