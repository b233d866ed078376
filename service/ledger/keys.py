"""Step keys: equal keys are the same work. Pure."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def canonical_json(document: Any) -> bytes:
    """Encode JSON one way only: sorted keys, no blanks, no NaN, UTF-8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_json(document: Any) -> str:
    """SHA-256 of the canonical form."""
    return hashlib.sha256(canonical_json(document)).hexdigest()


@dataclass(frozen=True)
class Toolchain:
    """What a worker makes things with."""

    #: Package -> version of everything whose change may change an output byte.
    versions: Mapping[str, str]
    #: Step kind -> digest of the code that performs it.
    revisions: Mapping[str, str]

    @property
    def id(self) -> str:
        """Digest of the versions."""
        return digest_json(dict(self.versions))

    def to_json(self) -> dict[str, Any]:
        """Return the form that worker rows and manifests hold."""
        return {"versions": dict(self.versions), "revisions": dict(self.revisions)}


def step_key(
    kind: str,
    params: Mapping[str, Any],
    checkpoint_digest: str | None,
    input_keys: Mapping[str, str],
    toolchain_id: str,
    revision: str,
) -> str:
    """Return the SHA-256 over everything that decides a step's output bytes."""
    return digest_json(
        {
            "kind": kind,
            "params": params,
            "checkpoint": checkpoint_digest,
            "inputs": input_keys,
            "toolchain": toolchain_id,
            "revision": revision,
        }
    )


def new_id(prefix: str) -> str:
    """Return a fresh identifier such as `job_1f0c9a…` (64 random bits)."""
    return f"{prefix}_{secrets.token_hex(8)}"
