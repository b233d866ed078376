"""Makes one upload of the parts of a resumable one, beside the requests.

Owns the threads that do it. Nobody is told to: whoever asks for an upload that is all there sets it going, and when the
process dies in between, whoever asks next does so again. Called by `service.api.resumable`.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from service.api.context import Context
from service.api.intake import open_spool
from service.errors import BlobCorrupt, BlobMissing, EdgeKilnError, NotFound
from service.ledger import resumable
from service.ledger.blobs import OutputFile, Reprieves
from service.storage import blob_key, check_stream

log = logging.getLogger(__name__)

#: Each has the whole file on this host's disk.
_AT_ONCE = 2
#: How long nobody else takes an assembly up after its last sign of life.
_HOLD_S = 600.0
#: Before another try after a full disk, or while the store is away: each begins with the first byte.
_PAUSE_S = 30.0


class Assembler:
    """The threads of one server."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="assembly")
        self._closed = threading.Event()

    def begin(self, tenant_id: str, upload_id: str, size_bytes: int, announced_digest: str | None) -> None:
        """Make the upload, unless somebody is at it; returns at once."""
        if not self._closed.is_set() and resumable.claim_assembly(
            self._context.database, tenant_id, upload_id, _HOLD_S
        ):
            self._pool.submit(self._assemble, tenant_id, upload_id, size_bytes, announced_digest)

    def close(self) -> None:
        """Give back what is not finished; returns when the threads have ended."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=False)

    def _assemble(self, tenant_id: str, upload_id: str, size_bytes: int, announced_digest: str | None) -> None:
        database = self._context.database
        try:
            if not self._make_upload(tenant_id, upload_id, size_bytes, announced_digest):
                resumable.hold_assembly(database, upload_id, 0)
        except NotFound:
            log.info("upload %s was given up while it was put together", upload_id)
        except (BlobMissing, BlobCorrupt) as error:
            log.warning("nothing can be made of upload %s: %s", upload_id, error)
            resumable.fail_assembly(database, upload_id, error.to_json())
        except EdgeKilnError as error:
            log.warning("upload %s cannot be put together now: %s", upload_id, error)
            resumable.hold_assembly(database, upload_id, _PAUSE_S)
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
                key = blob_key(part.digest)
                with self._context.store.open(key) as chunks:
                    for chunk in check_stream(chunks, key, part.digest):
                        spool.write(chunk)
                resumable.hold_assembly(database, upload_id, _HOLD_S)
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
