"""The device side of the adb protocol: one connection, its streams, shell and sync.

Owns bytes and packets; what a command does is `phone.Phone`'s. The protocol is described in AOSP's
`packages/modules/adb` (`protocol.txt`, `SYNC.TXT`, `shell_protocol.h`).
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import stat
import struct
import subprocess
import threading
from pathlib import Path

from tests.virtual_phone.phone import ConnectionLost, Phone

_VERSION = 0x01000001
_MAX_DATA = 256 * 1024
_BANNER = (
    "device::ro.product.name={name};ro.product.model={model};ro.product.device={device};features=shell_v2,stat_v2,cmd"
)
_AUTH_TOKEN = 1
_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = 0, 1, 2, 3, 4
_PIECE = 64 * 1024


class Connection:
    """One adb server's connection to the phone."""

    def __init__(self, phone: Phone, link: socket.socket) -> None:
        self._phone = phone
        self._link = link
        self._streams: dict[int, Stream] = {}
        self._next_id = 1
        self._sending = threading.Lock()

    def serve(self) -> None:
        """Answer until the other side, or a fault, ends it."""
        try:
            while True:
                command, arg0, arg1, data = self._receive()
                self._phone.wait_while_hung()
                self._dispatch(command, arg0, arg1, data)
        except (OSError, ConnectionLost):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Let the line go dead; what runs on the phone goes on."""
        for stream in list(self._streams.values()):
            stream.end()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()

    def send(self, command: bytes, arg0: int, arg1: int, data: bytes = b"") -> None:
        """Send one packet, unless a fault cuts it off."""
        (number,) = struct.unpack("<I", command)
        header = struct.pack("<6I", number, arg0, arg1, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        with self._sending:
            packet = header + data
            allowed = self._phone.spend_bytes(len(packet))
            self._link.sendall(packet[:allowed])
            if allowed < len(packet):
                self.close()
                raise ConnectionLost

    def forget(self, stream: Stream) -> None:
        """Free a stream's number."""
        self._streams.pop(stream.own_id, None)

    def _receive(self) -> tuple[bytes, int, int, bytes]:
        header = self._read(24)
        command, arg0, arg1, length, _, _ = struct.unpack("<4s5I", header)
        return command, arg0, arg1, self._read(length)

    def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            piece = self._link.recv(min(count - len(found), _PIECE))
            if not piece:
                raise ConnectionLost
            if self._phone.spend_bytes(len(piece)) < len(piece):
                raise ConnectionLost
            found += piece
        return found

    def _dispatch(self, command: bytes, arg0: int, arg1: int, data: bytes) -> None:
        if command == b"CNXN":
            self._greet()
        elif command == b"AUTH":
            # A signature gets another challenge; a public key waits for a person who never comes.
            if arg0 != 3:
                self.send(b"AUTH", _AUTH_TOKEN, 0, os.urandom(20))
        elif command == b"OPEN":
            stream = Stream(self, self._phone, self._next_id, arg0, data.rstrip(b"\0").decode())
            self._next_id += 1
            self._streams[stream.own_id] = stream
            stream.start()
        elif stream_of := self._streams.get(arg1):
            if command == b"WRTE":
                stream_of.incoming.put(data)
                self.send(b"OKAY", stream_of.own_id, arg0)
            elif command == b"OKAY":
                stream_of.may_write.release()
            elif command == b"CLSE":
                stream_of.end()

    def _greet(self) -> None:
        if self._phone.faults.get("auth") == "refuse":
            self.send(b"AUTH", _AUTH_TOKEN, 0, os.urandom(20))
            return
        properties = self._phone.properties
        names = {name: properties[f"ro.product.{name}"] for name in ("name", "model", "device")}
        self.send(b"CNXN", _VERSION, _MAX_DATA, _BANNER.format(**names).encode())


class Stream:
    """One service of a connection: a shell or a sync conversation."""

    def __init__(self, connection: Connection, phone: Phone, own_id: int, peer_id: int, service: str) -> None:
        self._connection = connection
        self._phone = phone
        self.own_id = own_id
        self._peer_id = peer_id
        self._service = service
        self.incoming: queue.Queue[bytes | None] = queue.Queue()
        self.may_write = threading.Semaphore(1)
        self._ended = threading.Event()
        self._buffer = b""

    def start(self) -> None:
        """Serve in a thread of its own."""
        threading.Thread(target=self._serve, daemon=True).start()

    def end(self) -> None:
        """Note that the other side listens no more."""
        self._ended.set()
        self.incoming.put(None)
        self.may_write.release()

    def write(self, data: bytes) -> None:
        """Send data, a packet at a time, each after the one before was taken."""
        for start in range(0, len(data), _PIECE):
            self.may_write.acquire()
            if self._ended.is_set():
                raise ConnectionLost
            self._connection.send(b"WRTE", self.own_id, self._peer_id, data[start : start + _PIECE])

    def read(self, count: int) -> bytes:
        """Return so many bytes of what the other side sends."""
        while len(self._buffer) < count:
            piece = self.incoming.get()
            if piece is None:
                raise ConnectionLost
            self._buffer += piece
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def _serve(self) -> None:
        try:
            kind, _, argument = self._service.partition(":")
            serve = {"shell": _Shell, "sync": _Sync}.get(kind.split(",")[0])
            if serve is None:
                self._connection.send(b"CLSE", 0, self._peer_id)
                return
            self._connection.send(b"OKAY", self.own_id, self._peer_id)
            serve(self, self._phone, kind, argument).run()
            # The last packet is taken before the end is told, as adbd does.
            self.may_write.acquire()
            self._connection.send(b"CLSE", self.own_id, self._peer_id)
        except (OSError, ConnectionLost):
            pass
        finally:
            self._connection.forget(self)


class _Shell:
    """`shell:` sends what a command prints; `shell,v2:` tells its streams apart and says how it ended."""

    def __init__(self, stream: Stream, phone: Phone, kind: str, command: str) -> None:
        self._stream = stream
        self._phone = phone
        self._is_v2 = "v2" in kind.split(",")
        self._command = command
        self._writing = threading.Lock()

    def run(self) -> None:
        process = self._phone.start_command(self._command, merged=not self._is_v2)
        pumps = [threading.Thread(target=self._pump, args=(process.stdout, _STDOUT), daemon=True)]
        if self._is_v2:
            pumps.append(threading.Thread(target=self._pump, args=(process.stderr, _STDERR), daemon=True))
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        status = self._phone.alter_status(self._command, process.wait())
        if self._is_v2 and not self._phone.matches("no_exit_packet", self._command):
            self._send(_EXIT, bytes([status & 0xFF]))

    def _pump(self, source: subprocess.Popen[bytes] | None, kind: int) -> None:
        try:
            while data := os.read(source.fileno(), _PIECE):  # type: ignore[union-attr]
                self._send(kind, self._phone.show_paths(data))
        except (OSError, ConnectionLost):
            pass

    def _send(self, kind: int, data: bytes) -> None:
        with self._writing:
            self._stream.write((struct.pack("<BI", kind, len(data)) if self._is_v2 else b"") + data)


class _Sync:
    """The file conversation: STAT, LST2, STA2, LIST, SEND, RECV, QUIT."""

    def __init__(self, stream: Stream, phone: Phone, kind: str, argument: str) -> None:
        self._stream = stream
        self._phone = phone

    def run(self) -> None:
        while True:
            verb, length = struct.unpack("<4sI", self._stream.read(8))
            argument = self._stream.read(length).decode()
            if verb == b"QUIT":
                return
            {b"STAT": self._stat, b"LST2": self._stat_v2, b"STA2": self._stat_v2, b"LIST": self._list,
             b"SEND": self._take, b"RECV": self._give}[verb](verb, argument)  # fmt: skip

    def _stat(self, verb: bytes, path: str) -> None:
        found = _lstat(self._phone.locate(path))
        answer = (found.st_mode, found.st_size, int(found.st_mtime)) if found else (0, 0, 0)
        self._stream.write(struct.pack("<4s3I", b"STAT", *answer))

    def _stat_v2(self, verb: bytes, path: str) -> None:
        found = _lstat(self._phone.locate(path))
        if found is None:
            self._stream.write(struct.pack("<4sI2Q4IQ3q", verb, 2, *[0] * 10))
            return
        values = (0, found.st_dev, found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid)
        times = (int(found.st_atime), int(found.st_mtime), int(found.st_ctime))
        self._stream.write(struct.pack("<4sI2Q4IQ3q", verb, *values, found.st_size, *times))

    def _list(self, verb: bytes, path: str) -> None:
        folder = self._phone.locate(path)
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            found, name = entry.lstat(), entry.name.encode()
            head = struct.pack("<4s4I", b"DENT", found.st_mode, found.st_size, int(found.st_mtime), len(name))
            self._stream.write(head + name)
        self._stream.write(struct.pack("<4s4I", b"DONE", 0, 0, 0, 0))

    def _take(self, verb: bytes, argument: str) -> None:
        path, _, mode = argument.rpartition(",")
        target = self._phone.locate(path)
        failure = "No space left on device" if self._phone.faults.get("disk_full") else None
        kept = self._phone.faults.get("truncate_push")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                while True:
                    part, length = struct.unpack("<4sI", self._stream.read(8))
                    if part == b"DONE":
                        break
                    data = self._stream.read(length)
                    room = len(data) if kept is None else max(0, kept - file.tell())
                    if failure is None:
                        file.write(data[:room])
            target.chmod(stat.S_IMODE(int(mode)))
            os.utime(target, (length, length))
        except OSError as error:
            failure = error.strerror or "write failed"
        if failure is None:
            self._stream.write(struct.pack("<4sI", b"OKAY", 0))
        else:
            text = f"couldn't write {path}: {failure}".encode()
            self._stream.write(struct.pack("<4sI", b"FAIL", len(text)) + text)

    def _give(self, verb: bytes, path: str) -> None:
        try:
            data = self._phone.locate(path).read_bytes()
        except OSError as error:
            text = f"open failed: {error.strerror}".encode()
            self._stream.write(struct.pack("<4sI", b"FAIL", len(text)) + text)
            return
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._stream.write(struct.pack("<4sI", b"DATA", len(piece)) + piece)
        self._stream.write(struct.pack("<4sI", b"DONE", 0))


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None
