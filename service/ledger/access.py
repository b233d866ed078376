"""Tenants and API keys.

A key is `ek_<8 characters of prefix>_<32 random bytes>`; the ledger keeps its SHA-256. It says who calls (the tenant)
and what the caller may do (scopes). Called by `service.api` for every request that carries a key and for `/v1/keys`,
and by `edgekiln keys`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, bindparam, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from service.errors import Conflict, InvalidRequest, LedgerBusy, NotFound, ScopeRequired, Unauthorized
from service.ledger.clock import now
from service.ledger.database import Database, Transaction, asks, reads, writes
from service.ledger.keys import new_id
from service.ledger.tables import ApiKey, Tenant

log = logging.getLogger(__name__)

#: Who a laptop's only user is.
DEFAULT_TENANT = "default"
_PREFIX_LENGTH = 11
_KEY = re.compile(r"ek_[0-9a-f]{8}_[A-Za-z0-9_-]{43}")
#: When a key was last used is written at most this often.
_USE_S = 60.0
_SHOWN = ("id", "name", "prefix", "scopes", "created_at", "expires_at", "last_used_at", "revoked_at", "replaced_by")


class Scope(StrEnum):
    """What a key's holder may do with its tenant's work."""

    #: Look at jobs, logs, artifacts, uploads and schedules, and download.
    READ = "read"
    #: Submit, upload, cancel, retry, delete, schedule.
    WRITE = "write"
    #: See and drain the fleet, with all tenants' work on it; make and end keys of the same tenant.
    OPERATE = "operate"


#: What a key may do unless it is said.
DEFAULT_SCOPES = (Scope.READ, Scope.WRITE)


@dataclass(frozen=True)
class NewKey:
    """A key that was just made; `secret` is never shown again."""

    id: str
    prefix: str
    secret: str


@dataclass(frozen=True)
class Caller:
    """Whose request it is, and what it may ask for."""

    tenant_id: str
    scopes: frozenset[Scope]
    #: None for whoever needs none.
    key_id: str | None = None


#: Whoever sits at the machine that serves on loopback.
LOCAL_CALLER = Caller(DEFAULT_TENANT, frozenset(Scope))


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Return scopes by their names; raises `InvalidRequest`."""
    asked = list(names)
    unknown = [name for name in asked if name not in list(Scope)]
    if unknown or not asked:
        raise InvalidRequest(f"A key has scopes among {', '.join(Scope)}, not {', '.join(unknown) or 'none'}.")
    return frozenset(Scope(name) for name in asked)


@writes
def ensure_tenant(tx: Transaction, tenant_id: str) -> None:
    """Enter a tenant unless it is there."""
    tx.connection.execute(tx.insert(Tenant).values(id=tenant_id, created_at=now()).on_conflict_do_nothing())


@writes
def create_key(
    tx: Transaction,
    tenant_id: str,
    name: str,
    lifetime_s: float | None = None,
    *,
    scopes: Iterable[Scope] = DEFAULT_SCOPES,
) -> NewKey:
    """Make an API key for a tenant that exists."""
    return _insert_key(tx, new_id("key"), tenant_id, name, lifetime_s, frozenset(scopes))


def _insert_key(
    tx: Transaction, key_id: str, tenant_id: str, name: str, lifetime_s: float | None, scopes: frozenset[Scope]
) -> NewKey:
    prefix = f"ek_{secrets.token_hex(4)}"
    secret = f"{prefix}_{secrets.token_urlsafe(32)}"
    tx.connection.execute(
        insert(ApiKey).values(
            id=key_id,
            tenant_id=tenant_id,
            name=name,
            prefix=prefix,
            key_digest=hashlib.sha256(secret.encode()).hexdigest(),
            scopes=" ".join(scope for scope in Scope if scope in scopes),
            created_at=now(),
            expires_at=None if lifetime_s is None else now(lifetime_s),
        )
    )
    return NewKey(key_id, prefix, secret)


@writes
def rotate_key(
    tx: Transaction,
    tenant_id: str,
    key_id: str,
    *,
    overlap_s: float,
    lifetime_s: float | None = None,
    granted: frozenset[Scope] = frozenset(Scope),
) -> NewKey:
    """Make a key with the same name and scopes, and let the old one end after `overlap_s`.

    Without `lifetime_s` the new key lives as long as the old one was meant to. Raises `NotFound` for a key that does
    not hold, `Conflict` for one that was rotated already, and `ScopeRequired` for one that may do more than `granted`.
    """
    row = tx.connection.execute(
        select(ApiKey.__table__, now(overlap_s).label("ends_at")).where(
            ApiKey.id == key_id, ApiKey.tenant_id == tenant_id, _holds()
        )
    ).one_or_none()
    if row is None:
        raise _not_found(key_id)
    scopes = _read_scopes(row.scopes)
    if not scopes <= granted:
        raise ScopeRequired(f"The key {key_id} may do more than yours ({row.scopes}); its like is not yours to make.")
    successor = new_id("key")
    ends_at: dt.datetime = row.ends_at if row.expires_at is None else min(row.expires_at, row.ends_at)
    rotated = tx.connection.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.replaced_by.is_(None))
        .values(replaced_by=successor, expires_at=ends_at)
    )
    if rotated.rowcount != 1:
        raise Conflict(f"The key {key_id} was rotated already; rotate its successor.", key_id=key_id)
    if lifetime_s is None and row.expires_at is not None:
        lifetime_s = (row.expires_at - row.created_at).total_seconds()
    return _insert_key(tx, successor, tenant_id, row.name, lifetime_s, scopes)


def authenticate(database: Database, secret: str) -> Caller:
    """Return whose key this is, and note that it was used; raises `Unauthorized`. Compares in constant time."""
    # The ledger is not asked about what cannot be a key.
    if not _KEY.fullmatch(secret):
        raise _unauthorized()
    caller, is_noted = _find_caller(database, secret)
    if not is_noted:
        try:
            _note_use(database, str(caller.key_id))
        except (LedgerBusy, SQLAlchemyError) as error:
            log.warning("cannot note that the key %s was used: %s", caller.key_id, type(error).__name__)
    return caller


@asks
def _find_caller(connection: Connection, secret: str) -> tuple[Caller, bool]:
    digest = hashlib.sha256(secret.encode()).hexdigest()
    row = connection.execute(_KEY_BY_PREFIX, {"prefix": secret[:_PREFIX_LENGTH]}).one_or_none()
    if not hmac.compare_digest(row.key_digest if row else "0" * 64, digest) or row is None:
        raise _unauthorized()
    return Caller(row.tenant_id, _read_scopes(row.scopes), row.id), bool(row.is_noted)


@writes
def _note_use(tx: Transaction, key_id: str) -> None:
    tx.connection.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=now()))


def _holds() -> Any:
    return ApiKey.revoked_at.is_(None) & or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now())


#: Built once: every request asks.
_KEY_BY_PREFIX = select(ApiKey.__table__, (ApiKey.last_used_at > now(-_USE_S)).label("is_noted")).where(
    ApiKey.prefix == bindparam("prefix"), _holds()
)


def _read_scopes(text: str) -> frozenset[Scope]:
    # One that a newer version has given is not ours to grant.
    return frozenset(Scope(name) for name in text.split() if name in list(Scope))


@reads
def list_keys(connection: Connection, tenant_id: str) -> list[dict[str, Any]]:
    """Return a tenant's keys without their secrets, the oldest first."""
    rows = connection.execute(
        select(ApiKey.__table__).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.created_at, ApiKey.id)
    )
    return [_describe_key(row) for row in rows]


@reads
def read_key(connection: Connection, tenant_id: str, key_id: str) -> dict[str, Any]:
    """Return one key without its secret; raises `NotFound`."""
    row = connection.execute(
        select(ApiKey.__table__).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id)
    ).one_or_none()
    if row is None:
        raise _not_found(key_id)
    return _describe_key(row)


def _describe_key(row: Any) -> dict[str, Any]:
    document = {name: getattr(row, name) for name in _SHOWN}
    instants = {name: value.isoformat() for name, value in document.items() if isinstance(value, dt.datetime)}
    return {**document, **instants, "scopes": row.scopes.split()}


@writes
def revoke_key(tx: Transaction, tenant_id: str, key_id: str) -> None:
    """End a key at once; raises `NotFound`."""
    revoked = tx.connection.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=now())
    )
    if revoked.rowcount != 1:
        raise _not_found(key_id)


def _not_found(key_id: str) -> NotFound:
    return NotFound(f"There is no valid key {key_id!r}. `edgekiln keys list` lists them.", key_id=key_id)


def _unauthorized() -> Unauthorized:
    return Unauthorized("The API key is not valid, has expired or was revoked. `edgekiln keys create` makes one.")
