"""Tokens that tenants have for sources: written, never shown; opened for a fetch of the same tenant alone.

Called by `service.api` (`/v1/tokens`), by `edgekiln tokens reseal`, and by `workers.runner` before a `resolve` or a
`fetch`. What the rows hold is sealed by `service.sealing`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, select, update

from service.errors import NotFound
from service.ledger.clock import now
from service.ledger.database import Database, Transaction, reads, writes
from service.ledger.tables import SourceToken
from service.sealing import Seal, fingerprint

#: Kinds of sources that take a token.
TOKEN_KINDS = ("hub",)


@writes
def set_token(tx: Transaction, seal: Seal, tenant_id: str, kind: str, token: str) -> None:
    """Store a tenant's token for a kind of source, in place of an earlier one; raises `InvalidSettings`."""
    values = {
        "sealed": seal.close(tenant_id, kind, token),
        "fingerprint": fingerprint(token),
        "created_at": now(),
    }
    tx.connection.execute(
        tx.insert(SourceToken)
        .values(tenant_id=tenant_id, kind=kind, **values)
        .on_conflict_do_update(index_elements=["tenant_id", "kind"], set_=values)
    )


@reads
def list_tokens(connection: Connection, tenant_id: str) -> list[dict[str, Any]]:
    """Return which tokens a tenant has, without the tokens."""
    rows = connection.execute(
        select(SourceToken.kind, SourceToken.fingerprint, SourceToken.created_at)
        .where(SourceToken.tenant_id == tenant_id)
        .order_by(SourceToken.kind)
    )
    return [{**row._asdict(), "created_at": row.created_at.isoformat()} for row in rows]


@writes
def remove_token(tx: Transaction, tenant_id: str, kind: str) -> None:
    """Forget a token; raises `NotFound`."""
    is_it = SourceToken.tenant_id == tenant_id, SourceToken.kind == kind
    if tx.connection.execute(delete(SourceToken).where(*is_it)).rowcount != 1:
        raise NotFound(f"There is no token for sources of the kind {kind!r}.", kind=kind)


@reads
def _read_sealed(connection: Connection, tenant_id: str, kind: str) -> str | None:
    return connection.execute(
        select(SourceToken.sealed).where(SourceToken.tenant_id == tenant_id, SourceToken.kind == kind)
    ).scalar_one_or_none()


def find_token(database: Database, seal: Seal, tenant_id: str, kind: str) -> str | None:
    """Return a tenant's token, opened, for the one fetch that needs it now; raises `InvalidSettings`."""
    sealed = _read_sealed(database, tenant_id, kind)
    return None if sealed is None else seal.open(tenant_id, kind, sealed)


@writes
def reseal_tokens(tx: Transaction, seal: Seal) -> tuple[int, list[dict[str, str]]]:
    """Seal every token with the first key, so that older keys can go.

    Returns how many were, and tenant and kind of those that none of the keys opens: they stay as they are.
    """
    rows = tx.connection.execute(
        select(SourceToken.tenant_id, SourceToken.kind, SourceToken.sealed).order_by(
            SourceToken.tenant_id, SourceToken.kind
        )
    ).all()
    lost = []
    for row in rows:
        sealed = seal.renew(row.sealed)
        if sealed is None:
            lost.append({"tenant": row.tenant_id, "kind": row.kind})
            continue
        # One that was set anew meanwhile is sealed with the first key already.
        is_it = SourceToken.tenant_id == row.tenant_id, SourceToken.kind == row.kind, SourceToken.sealed == row.sealed
        tx.connection.execute(update(SourceToken).where(*is_it).values(sealed=sealed))
    return len(rows) - len(lost), lost
