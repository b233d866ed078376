"""A checkpoint in a folder of this host.

Owns how a folder is pinned (by the bytes of its needed files) and copied. It reads regular files only, never
through a link that leaves the folder, and never writes to the source. Which folders a request may name is the
service's decision, not this module's; so that it holds, no part of the path may be a link by now. Called through
`workers.fetch.sources.open_source`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from service.checkpoint_files import MAX_LISTED_FILES, SourceFile, choose_needed, is_needed
from service.errors import (
    CheckpointUnsafe,
    InvalidRequest,
    SourceChanged,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
)
from workers.fetch.sources import (
    CHUNK_BYTES,
    ByteProgress,
    FetchedFile,
    Pinned,
    digest_canonical,
    report_full_disk,
)
from workers.steps import Progress


class FolderSource:
    """A local folder; its revision is SHA-256 over names, sizes and digests of the needed files."""

    def __init__(self, path: str, revision: str | None = None) -> None:
        if not Path(path).is_absolute():
            raise InvalidRequest(f"The source folder {path!r} must be an absolute path.", path=path)
        self._path = path
        self._revision = revision

    def pin(self, progress: Progress) -> Pinned:
        """Hash the needed files and return the folder's revision."""
        with _report_unreadable(self._path):
            root = self._find_root()
            files = self._list_needed(root)
            count = ByteProgress(progress, "hashing", sum(file.size_bytes for file in files))
            hashed = [_hash_into(root, file, None, count) for file in files]
        return Pinned({"kind": "folder", "path": self._path, "revision": _digest_revision(hashed)}, files)

    def bring(self, output_dir: Path, progress: Progress) -> list[FetchedFile]:
        """Copy the needed files while hashing them; raises `SourceChanged` if they are not the pinned ones."""
        if self._revision is None:
            raise InvalidRequest("A folder must be pinned by the resolve step before it is fetched.")
        with _report_unreadable(self._path):
            root = self._find_root()
            files = self._list_needed(root)
            count = ByteProgress(progress, "copying", sum(file.size_bytes for file in files))
            with report_full_disk(output_dir):
                copied = [_hash_into(root, file, output_dir / file.path, count) for file in files]
        found = _digest_revision(copied)
        if found != self._revision:
            raise SourceChanged(
                f"The files in {self._path} are no longer those that the job was pinned to; submit the job again.",
                path=self._path,
                pinned_revision=self._revision,
                found_revision=found,
            )
        return copied

    def _find_root(self) -> Path:
        try:
            root = Path(self._path).resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError, RuntimeError):
            raise SourceNotFound(f"There is no folder {self._path}; check the path.", path=self._path) from None
        if not root.is_dir():
            raise SourceNotFound(
                f"{self._path} is a file, not a folder; name the folder that holds it.", path=self._path
            )
        if root != Path(self._path):
            raise _report_link(self._path)
        return root

    def _list_needed(self, root: Path) -> list[SourceFile]:
        """List the root's entries (not its subfolders) and keep the needed ones."""
        entries: list[SourceFile] = []
        with os.scandir(root) as listing:
            for entry in listing:
                if len(entries) > MAX_LISTED_FILES:
                    break
                if is_needed(entry.name):
                    entries.append(SourceFile(entry.name, _find_inside(root, entry.name).stat().st_size))
                else:
                    entries.append(SourceFile(entry.name, 0))
        return choose_needed(entries, f"The folder {self._path}")


def _digest_revision(files: list[FetchedFile]) -> str:
    return digest_canonical(sorted([file.path, file.size_bytes, file.sha256] for file in files))


def _find_inside(root: Path, name: str) -> Path:
    """Return the real path of a needed file; raises `CheckpointUnsafe` if it lies outside or is not a regular file."""
    try:
        real = (root / name).resolve(strict=True)
    except (FileNotFoundError, RuntimeError):
        raise SourceNotFound(f"{name} in {root} is a link to nothing.", file=name) from None
    if not real.is_relative_to(root):
        raise CheckpointUnsafe(
            f"{name} in {root} is a link that leaves the folder; copy the files themselves into it (cp -rL).", file=name
        )
    if not stat.S_ISREG(real.lstat().st_mode):
        raise CheckpointUnsafe(f"{name} in {root} is not a regular file.", file=name)
    return real


@contextmanager
def _open_regular(root: Path, name: str) -> Iterator[io.FileIO]:
    """Open a needed file for reading, refusing links and devices that appeared since the folder was listed."""
    real = _find_inside(root, name)
    with _open_folder(real.parent) as folder:
        # O_NONBLOCK so that a pipe put in the file's place cannot hang the step before fstat sees it.
        descriptor = _open_below(folder, real, real.name, os.O_RDONLY | os.O_NONBLOCK)
    with io.FileIO(descriptor) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise CheckpointUnsafe(f"{name} in {root} is not a regular file.", file=name)
        yield stream


@contextmanager
def _open_folder(path: Path) -> Iterator[int]:
    """Open a folder part by part, so that none of them is a link, whoever puts one there meanwhile."""
    descriptor = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.parts[1:]:
            deeper = _open_below(descriptor, path, part, os.O_PATH | os.O_DIRECTORY)
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)


def _open_below(folder: int, path: Path, part: str, flags: int) -> int:
    """Open one `part` of `path` in a folder; raises `SourceChanged` if it is a link."""
    try:
        return os.open(part, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        # A link is no folder either.
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _report_link(str(path)) from None
        error.filename = str(path)
        raise


def _report_link(path: str) -> SourceChanged:
    return SourceChanged(
        f"{path} leads through a link, and did not when the job was submitted; submit it again, or name the folder "
        "itself.",
        path=path,
    )


def _hash_into(root: Path, file: SourceFile, target: Path | None, count: ByteProgress) -> FetchedFile:
    """Hash one file and, if `target` is given, write the same bytes there."""
    digest = hashlib.sha256()
    size_bytes = 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with ExitStack() as stack:
        stream = stack.enter_context(_open_regular(root, file.path))
        copy = None if target is None else stack.enter_context(target.open("wb"))
        while read := stream.readinto(buffer):
            digest.update(buffer[:read])
            if copy is not None:
                copy.write(buffer[:read])
            size_bytes += read
            count.add(read, file.path)
            if size_bytes > file.size_bytes:
                break
    if size_bytes != file.size_bytes:
        raise SourceChanged(
            f"{file.path} in {root} changed while it was read; submit the job again when it is complete.",
            file=file.path,
        )
    return FetchedFile(file.path, size_bytes, digest.hexdigest())


@contextmanager
def _report_unreadable(path: str) -> Iterator[None]:
    """Turn refused permissions and vanished or unreadable files into typed errors."""
    try:
        yield
    except PermissionError as error:
        raise SourceForbidden(
            f"{error.filename or path} may not be read by the worker; change its permissions.", path=path
        ) from error
    except FileNotFoundError as error:
        raise SourceChanged(f"{error.filename or path} vanished while it was read; submit the job again.") from error
    except OSError as error:
        raise SourceUnavailable(f"Reading {path} failed: {error.strerror}; check the disk and retry.") from error
