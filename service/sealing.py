"""Secrets at rest: sealed with the operator's keys, each for one tenant and one purpose.

Owns the form of what is stored: a Fernet token (AES-128-CBC with HMAC-SHA-256) of a JSON list that names tenant and
purpose, so that a row moved to another tenant does not open. Called by `service.ledger.tokens`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from service.errors import InvalidSettings


def make_sealing_key() -> str:
    """Return a new key for `EDGEKILN_TOKEN_KEYS`."""
    return Fernet.generate_key().decode()


def fingerprint(secret: str) -> str:
    """Return what a secret is recognised by, and nothing can be learned from."""
    return f"sha256:{hashlib.sha256(secret.encode()).hexdigest()[:12]}"


class Seal:
    """The operator's keys: the first one seals, every one of them opens."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys]) if keys else None

    def close(self, tenant_id: str, purpose: str, secret: str) -> str:
        """Return the sealed form of a secret; raises `InvalidSettings` without a key."""
        return self._keys().encrypt(json.dumps([tenant_id, purpose, secret]).encode()).decode()

    def open(self, tenant_id: str, purpose: str, sealed: str) -> str:
        """Return a secret that was sealed for this tenant and purpose; raises `InvalidSettings`."""
        try:
            owner, use, secret = json.loads(self._keys().decrypt(sealed.encode()))
        except InvalidToken:
            raise _cannot_open() from None
        if (owner, use) != (tenant_id, purpose):
            raise _cannot_open()
        return str(secret)

    def renew(self, sealed: str) -> str | None:
        """Return what was sealed with any of the keys, sealed with the first; None for what none of them opens.

        Raises `InvalidSettings` without a key.
        """
        try:
            return self._keys().rotate(sealed.encode()).decode()
        except InvalidToken:
            return None

    def _keys(self) -> MultiFernet:
        if self._fernet is None:
            raise InvalidSettings(
                "Tokens are stored sealed, and no key is set to seal them with. The operator sets EDGEKILN_TOKEN_KEYS; "
                "`edgekiln tokens key` makes a key."
            )
        return self._fernet


def _cannot_open() -> InvalidSettings:
    return InvalidSettings(
        "A stored token cannot be opened with the keys in EDGEKILN_TOKEN_KEYS. The operator adds the key that it was "
        "sealed with, or the token is set again."
    )
