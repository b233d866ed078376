"""Checkpoints that were uploaded: `resolve` and `fetch` without a child, since their bytes are in the store already.

Nothing is copied and no file is opened: the step's outputs are the uploads themselves, which the job holds. Whoever
reads them next checks their digests, as of every output. Called by `workers.runner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.checkpoint_files import SourceFile, choose_needed
from service.errors import BlobMissing
from service.ledger import uploads
from service.ledger.blobs import OutputFile
from service.ledger.claims import Claim
from service.ledger.database import Database
from service.ledger.results import Success, Usage
from service.storage import ObjectStore, blob_key
from workers.fetch.sources import FetchedFile, digest_checkpoint


def is_uploaded(claim: Claim) -> bool:
    """Tell whether a step is `resolve` or `fetch` of an uploaded checkpoint."""
    return claim.kind in ("resolve", "fetch") and claim.params["source"]["kind"] == "upload"


def adopt_uploads(database: Database, store: ObjectStore, claim: Claim) -> Success:
    """Return what the step yields; raises `UploadNotFound`, `BlobMissing` and what `choose_needed` does."""
    digests: Mapping[str, str] = claim.params["source"]["files"]
    sizes = uploads.read_sizes(database, claim.tenant_id, digests.values())
    needed = choose_needed([SourceFile(name, sizes[digest], digest) for name, digest in digests.items()], "The upload")
    files = [FetchedFile(file.path, file.size_bytes, digests[file.path]) for file in needed]
    figures: dict[str, Any] = {"size_bytes": sum(file.size_bytes for file in files)}
    # Nothing that a stranger wrote was opened.
    usage = Usage(isolation="strong")
    if claim.kind == "resolve":
        source = {"kind": "upload", "files": dict(digests), "revision": digest_checkpoint(files)}
        return Success({**figures, "source": source, "files": [file.to_json() for file in needed]}, (), usage)
    for file in files:
        _require_stored(store, file)
    figures |= {"checkpoint_digest": digest_checkpoint(files), "files": [file.to_json() for file in files]}
    return Success(figures, [OutputFile(file.path, file.sha256, file.size_bytes) for file in files], usage)


def _require_stored(store: ObjectStore, file: FetchedFile) -> None:
    try:
        stored_bytes = store.stat(blob_key(file.sha256)).size_bytes
    except BlobMissing:
        stored_bytes = -1
    if stored_bytes != file.size_bytes:
        raise BlobMissing(
            f"{file.path}, uploaded as {file.sha256}, is missing or damaged in the store. Upload it again, then retry "
            "the job.",
            digest=file.sha256,
        )
