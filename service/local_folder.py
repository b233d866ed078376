"""A folder of this machine as a source for a server that cannot read it: its files' names and digests.

Called by `service.client` and `service.commands`.
"""

from __future__ import annotations

from pathlib import Path

from service.checkpoint_files import SourceFile, choose_needed
from service.errors import SourceNotFound
from service.requests import UploadSource
from service.storage import digest_file


def read_folder(folder: Path) -> tuple[UploadSource, dict[str, Path]]:
    """Return the source that a folder's checkpoint is once it is uploaded, and digest -> file of what to upload.

    Reads all its files. Raises `SourceNotFound`, `CheckpointInvalid` and `CheckpointUnsafe`.
    """
    try:
        listed = [SourceFile(path.name, path.stat().st_size) for path in sorted(folder.iterdir()) if path.is_file()]
        digests = {
            file.path: digest_file(folder / file.path)[0] for file in choose_needed(listed, f"The folder {folder}")
        }
    except OSError as error:
        place = error.filename or folder
        raise SourceNotFound(f"{place} cannot be read: {error.strerror}.", path=str(folder)) from error
    source = UploadSource(files=digests, name=folder.resolve().name[:100] or None)
    return source, {digest: folder / name for name, digest in digests.items()}
