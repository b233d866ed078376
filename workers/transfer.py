"""Bytes of one attempt, between the store, or this host's cache of it, and the step's own folder.

Every file is checked against its digest on the way in, and digested on the way out. Knows no child and changes no
state, but for one: nobody may join a step whose bytes turn out to be gone. Used by `workers.runner` only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from service.errors import BlobCorrupt, BlobMissing, StoreUnavailable
from service.ledger import claims, results
from service.ledger.blobs import OutputFile
from service.ledger.database import Database
from service.storage import ObjectStore, blob_key, digest_file
from service.user_files import UPLOAD_FILE
from workers.blob_cache import BlobCache
from workers.catalog import CATALOG
from workers.keeper import LeaseKeeper
from workers.metrics import record_bytes

log = logging.getLogger(__name__)

#: How long a finished step waits for a store that is away, and between tries: hours of work hang on an upload.
_PATIENCE_S = 300.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 10.0


class Transfer:
    """Moves files while `keeper` holds the claim; `shutdown` ends all waiting."""

    def __init__(
        self,
        database: Database,
        store: ObjectStore,
        blobs: BlobCache,
        claim: claims.Claim,
        keeper: LeaseKeeper,
        shutdown: threading.Event,
        *,
        inputs_are_read_only: bool = False,
    ) -> None:
        self._database = database
        self._store = store
        self._blobs = blobs
        self._claim = claim
        self._keeper = keeper
        self._shutdown = shutdown
        self._inputs_are_read_only = inputs_are_read_only
        #: What was moved so far.
        self.read_bytes = 0
        self.written_bytes = 0

    def place_inputs(self, folder: Path) -> dict[str, Path]:
        """Copy what the step reads below `folder`, one folder an input; an upload is a file called `UPLOAD_FILE`."""
        reads = CATALOG[self._claim.kind].reads
        folders: dict[str, Path] = {}
        for name, supplier in self._claim.inputs.items():
            if reads is None or name in reads:
                folders[name] = folder / name
                self._place_outputs(supplier, folders[name])
        uploads: Mapping[str, str] = self._claim.params.get("uploads", {})
        for name, digest in uploads.items():
            folders[name] = folder / name
            self._place_upload(name, digest, folders[name])
        return folders

    def _place_outputs(self, supplier: claims.ClaimInput, folder: Path) -> None:
        for output in supplier.outputs:
            self._keeper.check()
            path = folder / output.name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._get_file(output.digest, path)
            except (BlobMissing, BlobCorrupt):
                # Nobody may join work whose bytes are gone; a retry makes it again.
                results.retire_step(self._database, supplier.step_id)
                raise

    def _place_upload(self, name: str, digest: str, folder: Path) -> None:
        self._keeper.check()
        folder.mkdir(parents=True)
        try:
            self._get_file(digest, folder / UPLOAD_FILE)
        except (BlobMissing, BlobCorrupt) as error:
            raise type(error)(
                f"The {name.replace('_', ' ')} that was uploaded as {digest} is missing or damaged in the store. "
                "Upload the file again, then retry the job.",
                digest=digest,
            ) from error

    def _get_file(self, digest: str, path: Path) -> None:
        was_cached = self._blobs.get_file(
            digest, path, is_read_only=self._inputs_are_read_only, check=self._keeper.check
        )
        size_bytes = path.stat().st_size
        self.read_bytes += size_bytes
        record_bytes("cached" if was_cached else "read", size_bytes)

    def place_files(self, folder: Path, files: Mapping[str, str]) -> Path:
        """Copy files that a step needs besides its inputs (name -> digest) into a folder, and return it."""
        folder.mkdir(parents=True)
        for name, digest in files.items():
            self._keeper.check()
            self._get_file(digest, folder / name)
        return folder

    def store_outputs(self, output_dir: Path) -> list[OutputFile]:
        """Upload every file below a folder and return them by their relative names."""
        names = (path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if path.is_file())
        give_up_at = time.monotonic() + _PATIENCE_S
        return [self._store_patiently(output_dir / name, name, give_up_at) for name in sorted(names)]

    def store_again(self, output_dir: Path, outputs: Iterable[OutputFile], digests: Iterable[str]) -> None:
        """Upload those outputs once more that have these digests."""
        wanted = set(digests)
        give_up_at = time.monotonic() + _PATIENCE_S
        for output in outputs:
            if output.digest in wanted:
                self._store_patiently(output_dir / output.name, output.name, give_up_at)

    def _store_patiently(self, path: Path, name: str, give_up_at: float) -> OutputFile:
        """Upload, and again while the store is away; ends early when the lease is lost or the worker shuts down."""
        pause_s = _FIRST_PAUSE_S
        while True:
            self._keeper.check()
            try:
                output = self.store_file(path, name)
                self._blobs.keep(output.digest, path)
                return output
            except StoreUnavailable as error:
                if self._shutdown.is_set() or time.monotonic() + pause_s > give_up_at:
                    raise
                log.warning("cannot store %s, next try in %g s: %s", name, pause_s, error)
            self._shutdown.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def store_file(self, path: Path, name: str) -> OutputFile:
        """Upload one file; the child that wrote it has ended, with all its processes."""
        digest, size_bytes = digest_file(path)
        self._store.put_file(blob_key(digest), path, digest, is_final=True)
        self.written_bytes += size_bytes
        record_bytes("written", size_bytes)
        return OutputFile(name, digest, size_bytes)
