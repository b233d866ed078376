"""Makes one upload of the parts of a resumable one, beside the requests.

Owns the threads that do it. Nobody is told to: whoever asks for an upload that is all there sets it going, and when the
process dies in between, whoever asks next does so again. Called by `service.api.resumable`.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from service.api.context import Context
from service.api.intake import Spool, open_spool
from service.errors import BlobCorrupt, BlobMissing, EdgeKilnError, NotFound
from service.ledger import resumable
from service.ledger.blobs import OutputFile, Reprieves
from service.ledger.database import LEDGER_AWAY
from service.storage import blob_key, check_stream

log = logging.getLogger(__name__)

#: Each has the whole file on this host's disk.
_AT_ONCE = 2
#: How long nobody else takes an assembly up after its last sign of life, and how often there is one.
_HOLD_S = 60.0
_BEAT_S = 10.0
#: Before another try after a full disk, or while the store is away: each begins with the first byte.
_PAUSE_S = 30.0
#: How often a part is read that comes with other bytes than it has, and how long after.
_READS = 4
_READ_PAUSE_S = 1.0


class Assembler:
    """The threads of one server."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="assembly")
        self._closed = threading.Event()
        #: What is done here or waits for a thread.
        self._held: set[str] = set()
        self._beating = threading.Thread(target=self._beat, name="assembly-beat", daemon=True)
        self._beating.start()

    def begin(self, tenant_id: str, upload_id: str, size_bytes: int, announced_digest: str | None) -> None:
        """Make the upload, unless somebody is at it; returns at once."""
        if not self._closed.is_set() and resumable.claim_assembly(
            self._context.database, tenant_id, upload_id, _HOLD_S
        ):
            self._held.add(upload_id)
            try:
                self._pool.submit(self._assemble, tenant_id, upload_id, size_bytes, announced_digest)
            except RuntimeError:
                # The server stops: another one, or the next, takes it up.
                self._held.discard(upload_id)
                resumable.hold_assembly(self._context.database, upload_id, 0)

    def close(self) -> None:
        """Give back what is not finished; returns when the threads have ended."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=False)
        self._beating.join()

    def _beat(self) -> None:
        """Show that this process lives, until it ends: `Client.upload` waits for as long."""
        while not self._closed.wait(_BEAT_S):
            for upload_id in list(self._held):
                if upload_id in self._held:
                    self._hold(upload_id)

    def _hold(self, upload_id: str) -> None:
        try:
            resumable.hold_assembly(self._context.database, upload_id, _HOLD_S)
        except LEDGER_AWAY as error:
            log.warning("upload %s cannot be held: %s", upload_id, error)
        except Exception:
            # The thread must outlive it: all other assemblies count on it.
            log.exception("upload %s cannot be held", upload_id)

    def _assemble(self, tenant_id: str, upload_id: str, size_bytes: int, announced_digest: str | None) -> None:
        database = self._context.database
        try:
            try:
                is_done = self._make_upload(tenant_id, upload_id, size_bytes, announced_digest)
            finally:
                self._held.discard(upload_id)
            if not is_done:
                resumable.hold_assembly(database, upload_id, 0)
        except NotFound:
            log.info("upload %s was given up while it was put together", upload_id)
        except (BlobMissing, BlobCorrupt) as error:
            log.warning("nothing can be made of upload %s: %s", upload_id, error)
            resumable.fail_assembly(database, upload_id, error.to_json())
        except EdgeKilnError as error:
            log.warning("upload %s cannot be put together now: %s", upload_id, error)
            resumable.put_off_assembly(database, upload_id, _PAUSE_S)
        except Exception:
            # The hold runs out by itself.
            log.exception("upload %s could not be put together", upload_id)

    def _make_upload(self, tenant_id: str, upload_id: str, size_bytes: int, announced_digest: str | None) -> bool:
        """Read the parts in order and store the whole; return False if the server stops meanwhile."""
        database = self._context.database

        def commit(file: OutputFile, reprieves: Reprieves) -> None:
            resumable.finish_assembly(database, tenant_id, upload_id, file, reprieves)

        with open_spool(self._context) as spool:
            for part in resumable.read_parts(database, upload_id):
                if self._closed.is_set() or self._context.stopping.is_set():
                    return False
                self._append(spool, part.digest)
            if spool.size_bytes != size_bytes:
                log.info("upload %s was put together by another meanwhile", upload_id)
                return True
            if announced_digest not in (None, spool.digest):
                raise BlobCorrupt(
                    f"The upload has SHA-256 {spool.digest} instead of {announced_digest}, which was announced. Upload "
                    "the file again.",
                    expected=announced_digest,
                    found=spool.digest,
                )
            spool.keep(self._context, commit)
        return True

    def _append(self, spool: Spool, digest: str) -> None:
        """Read a part; raises `BlobCorrupt` when it is damaged each time, and not only on its way."""
        key, mark = blob_key(digest), spool.mark()
        for reads_left in reversed(range(_READS)):
            try:
                with self._context.store.open(key) as chunks:
                    for chunk in check_stream(chunks, key, digest):
                        spool.write(chunk)
                return
            except BlobCorrupt as error:
                if not reads_left:
                    raise
                log.warning("a part is read again: %s", error)
                spool.return_to(mark)
                self._closed.wait(_READ_PAUSE_S)
