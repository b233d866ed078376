"""Objects as files below one folder.

Owns the embedded profile's store: an object is a file under its key, written to `.uploads/`, flushed, and
renamed, so that a reader, a crash or a power cut sees all of it or nothing.
"""

from __future__ import annotations

import hashlib
import os
import stat as modes
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from service.errors import BlobMissing, StoreUnavailable
from service.storage.digests import copy_object, digest_bytes, digest_file, report_corrupt
from service.storage.disk import disk_errors
from service.storage.keys import check_digest, check_key, check_prefix
from service.storage.protocol import StoredObject

_CHUNK_BYTES = 1 << 20
#: Starts with a dot: no key can name it.
_UPLOADS = ".uploads"


class FolderStore:
    """An `ObjectStore` in a local or mounted folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        with disk_errors(self.root):
            (self.root / _UPLOADS).mkdir(parents=True, exist_ok=True)

    def put_file(self, key: str, path: Path, sha256: str, *, is_final: bool = False, anew: bool = False) -> bool:
        """See `ObjectStore.put_file`; an object that is there is read again, so that a damaged one is replaced."""
        with path.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            chunks = iter(lambda: stream.read(_CHUNK_BYTES), b"")
            return self._put(key, chunks, sha256, None if anew else size_bytes, path if is_final else None)

    def put_bytes(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put_bytes`."""
        return self._put(key, [data], digest_bytes(data), len(data))

    @contextmanager
    def open(self, key: str, start: int = 0, end: int | None = None) -> Iterator[Iterator[bytes]]:
        """See `ObjectStore.open`."""
        if start < 0 or (end is not None and end < start):
            raise ValueError(f"[{start}, {end}) is not a range of bytes")
        target = self._locate(key)
        with self._errors(key):
            self._require_file(key, target)
            stream = target.open("rb")
        try:
            yield self._read(stream.read, stream.seek, start, end)
        finally:
            stream.close()

    def get_file(self, key: str, path: Path, sha256: str, *, is_read_only: bool = False) -> int:
        """See `ObjectStore.get_file`."""
        if is_read_only:
            check_digest(sha256)
            partial = path.with_name(f".part-{uuid.uuid4().hex}")
            with self._errors(key):
                self._require_file(key, self._locate(key))
            if _link(self._locate(key), partial):
                return _keep_if_whole(key, partial, path, sha256)
        return copy_object(self, key, path, sha256)

    def shares_disk_with(self, folder: Path) -> bool:
        """See `ObjectStore.shares_disk_with`."""
        with disk_errors(self.root):
            return self.root.stat().st_dev == folder.stat().st_dev

    def stat(self, key: str) -> StoredObject:
        """See `ObjectStore.stat`."""
        target = self._locate(key)
        with self._errors(key):
            return _describe(key, self._require_file(key, target))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`; durable when it returns."""
        target = self._locate(key)
        with disk_errors(self.root):
            try:
                target.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
            _flush_folder(target.parent)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """See `ObjectStore.list`."""
        folder = check_prefix(prefix).rpartition("/")[0]
        return self._walk(f"{folder}/" if folder else "", prefix)

    def abort_stale_uploads(self, older_than_s: float) -> int:
        """See `ObjectStore.abort_stale_uploads`; the age is the time since the last byte was written."""
        removed = 0
        with disk_errors(self.root), os.scandir(self.root / _UPLOADS) as entries:
            for entry in entries:
                try:
                    if time.time() - entry.stat().st_mtime >= older_than_s:
                        Path(entry.path).unlink()
                        removed += 1
                except FileNotFoundError:  # finished, or swept by another process
                    continue
        return removed

    def check(self) -> None:
        """See `ObjectStore.check`."""
        key = f"probes/{uuid.uuid4().hex}"
        data = key.encode()
        try:
            self.put_bytes(key, data)
            with self.open(key) as chunks:
                if b"".join(chunks) != data:
                    raise StoreUnavailable(f"{self.root} returned other bytes than were written to it.")
        finally:
            self.delete(key)

    def _locate(self, key: str) -> Path:
        return self.root / check_key(key)

    def _put(
        self, key: str, chunks: Iterable[bytes], sha256: str, size_bytes: int | None, source: Path | None = None
    ) -> bool:
        """Write an object; one of `size_bytes` with the right digest stays as it is, if a size is given."""
        target = self._locate(key)
        check_digest(sha256)
        with disk_errors(self.root):
            if size_bytes is not None and self._holds(target, sha256, size_bytes):
                # Whoever renamed it may not have flushed the folder yet.
                _flush_folder(target.parent)
                return False
            upload = self.root / _UPLOADS / uuid.uuid4().hex
            try:
                if source is not None and _link(source, upload):
                    _require_digest(key, upload, sha256)
                    _flush_file(upload)
                else:
                    self._write(key, upload, chunks, sha256)
                self._make_folder(target.parent)
                upload.replace(target)
            except BaseException:
                upload.unlink(missing_ok=True)
                raise
            _flush_folder(target.parent)
        return True

    @staticmethod
    def _holds(target: Path, sha256: str, size_bytes: int) -> bool:
        try:
            return target.stat().st_size == size_bytes and digest_file(target)[0] == sha256
        except (FileNotFoundError, NotADirectoryError):
            return False

    @staticmethod
    def _write(key: str, upload: Path, chunks: Iterable[bytes], sha256: str) -> None:
        digest = hashlib.sha256()
        size_bytes = 0
        with upload.open("xb") as stream:
            for chunk in chunks:
                digest.update(chunk)
                size_bytes += stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
            written_bytes = os.fstat(stream.fileno()).st_size
        if digest.hexdigest() != sha256 or written_bytes != size_bytes:
            raise report_corrupt(key, sha256, digest.hexdigest(), written_bytes)

    def _make_folder(self, folder: Path) -> None:
        missing = [folder, *folder.parents]
        missing = missing[: missing.index(self.root)]
        for level in reversed(missing):
            try:
                level.mkdir()
            except FileExistsError:
                continue
            _flush_folder(level.parent)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        with disk_errors(self.root):
            try:
                yield
            except (FileNotFoundError, NotADirectoryError):
                raise _report_missing(key, self.root) from None

    def _require_file(self, key: str, target: Path) -> os.stat_result:
        status = target.stat()
        if not modes.S_ISREG(status.st_mode):
            raise _report_missing(key, self.root)
        return status

    def _read(
        self, read: Callable[[int], bytes], seek: Callable[[int], int], start: int, end: int | None
    ) -> Iterator[bytes]:
        with disk_errors(self.root):
            seek(start)
        position = start
        while end is None or position < end:
            wanted = _CHUNK_BYTES if end is None else min(_CHUNK_BYTES, end - position)
            with disk_errors(self.root):
                chunk = read(wanted)
            if not chunk:
                return
            position += len(chunk)
            yield chunk

    def _walk(self, folder_key: str, prefix: str) -> Iterator[StoredObject]:
        with disk_errors(self.root):
            try:
                entries = list(os.scandir(self.root / folder_key))
            except (FileNotFoundError, NotADirectoryError):
                return
        # A folder sorts as its name with a slash, which puts whole keys in the order of S3 listings.
        for name, entry in sorted((e.name + "/" * e.is_dir(), e) for e in entries if not e.name.startswith(".")):
            key = folder_key + name
            if entry.is_dir():
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix):
                with disk_errors(self.root):
                    try:
                        found = _describe(key, entry.stat())
                    except FileNotFoundError:  # deleted meanwhile
                        continue
                yield found


def _describe(key: str, status: os.stat_result) -> StoredObject:
    return StoredObject(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _report_missing(key: str, root: Path) -> BlobMissing:
    return BlobMissing(f"There is no object {key} in {root}.", key=key)


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name; return False where the file system has none to give."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _require_digest(key: str, path: Path, sha256: str) -> int:
    """Return a file's size in bytes, or raise `BlobCorrupt`."""
    found, size_bytes = digest_file(path)
    if found != sha256:
        raise report_corrupt(key, sha256, found, size_bytes)
    return size_bytes


def _keep_if_whole(key: str, partial: Path, path: Path, sha256: str) -> int:
    """Move a file to its place if its bytes are right; return their number."""
    with disk_errors(path.parent):
        try:
            size_bytes = _require_digest(key, partial, sha256)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return size_bytes


def _flush_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
