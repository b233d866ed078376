"""Tenants and API keys.

A key is `ek_<8 characters of prefix>_<32 random bytes>`; the ledger keeps its SHA-256. Called by
`service.api` for every request that carries a key, and by `edgekiln keys`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, or_, select, update

from service.errors import NotFound, Unauthorized
from service.ledger.clock import now
from service.ledger.database import Transaction, reads, writes
from service.ledger.keys import new_id
from service.ledger.tables import ApiKey, Tenant

#: Who a laptop's only user is.
DEFAULT_TENANT = "default"


@dataclass(frozen=True)
class NewKey:
    """A key that was just made; `secret` is never shown again."""

    id: str
    prefix: str
    secret: str


@dataclass(frozen=True)
class Caller:
    """Whose request it is."""

    tenant_id: str
    #: Whether the fleet, and all tenants' work on it, may be seen and managed.
    is_operator: bool


#: Whoever sits at the machine that serves on loopback.
LOCAL_CALLER = Caller(DEFAULT_TENANT, is_operator=True)


@writes
def ensure_tenant(tx: Transaction, tenant_id: str) -> None:
    """Enter a tenant unless it is there."""
    tx.connection.execute(tx.insert(Tenant).values(id=tenant_id, created_at=now()).on_conflict_do_nothing())


@writes
def create_key(
    tx: Transaction, tenant_id: str, name: str, lifetime_s: float | None = None, *, is_operator: bool = False
) -> NewKey:
    """Make an API key for a tenant that exists."""
    prefix = f"ek_{secrets.token_hex(4)}"
    secret = f"{prefix}_{secrets.token_urlsafe(32)}"
    key_id = new_id("key")
    tx.connection.execute(
        insert(ApiKey).values(
            id=key_id,
            tenant_id=tenant_id,
            name=name,
            prefix=prefix,
            key_digest=hashlib.sha256(secret.encode()).hexdigest(),
            is_operator=is_operator,
            created_at=now(),
            expires_at=None if lifetime_s is None else now(lifetime_s),
        )
    )
    return NewKey(key_id, prefix, secret)


@reads
def find_caller(connection: Connection, secret: str) -> Caller:
    """Return whose key this is; raises `Unauthorized`. Compares in constant time."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    row = connection.execute(
        select(ApiKey.tenant_id, ApiKey.is_operator, ApiKey.key_digest).where(
            ApiKey.prefix == secret[:11],
            ApiKey.revoked_at.is_(None),
            or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now()),
        )
    ).one_or_none()
    if not hmac.compare_digest(row.key_digest if row else "0" * 64, digest) or row is None:
        raise Unauthorized("The API key is not valid, has expired or was revoked. `edgekiln keys create` makes one.")
    return Caller(row.tenant_id, row.is_operator)


@reads
def list_keys(connection: Connection, tenant_id: str) -> list[dict[str, Any]]:
    """Return a tenant's keys without their secrets."""
    rows = connection.execute(
        select(
            ApiKey.id,
            ApiKey.name,
            ApiKey.prefix,
            ApiKey.is_operator,
            ApiKey.created_at,
            ApiKey.expires_at,
            ApiKey.revoked_at,
        )
        .where(ApiKey.tenant_id == tenant_id)
        .order_by(ApiKey.created_at)
    )
    return [
        {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in row._asdict().items()}
        for row in rows
    ]


@writes
def revoke_key(tx: Transaction, tenant_id: str, key_id: str) -> None:
    """End a key at once; raises `NotFound`."""
    revoked = tx.connection.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=now())
    )
    if revoked.rowcount != 1:
        raise NotFound(f"There is no valid key {key_id!r}. `edgekiln keys list` lists them.", key_id=key_id)
