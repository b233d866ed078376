"""Signatures of published files, with a key: the Sigstore bundle that `model-signing` writes and reads.

A bundle holds a DSSE envelope around an in-toto statement that names files by SHA-256. Signing is deterministic
(RFC 6979): equal files and an equal key give equal signatures. Called by `workers.publish` and `service.downloads`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from service.errors import InvalidSettings, SignatureInvalid

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
#: How `model-signing` goes through the folder that it checks.
_SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
#: The hash that goes with each curve.
_HASHES: dict[int, type[hashes.HashAlgorithm]] = {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}


def manifest_name(name: str) -> str:
    """Return the name of the file with an artifact's manifest, beside it."""
    return f"{name}.manifest.json"


class Signer:
    """The operator's private key: a PEM file with an elliptic curve key (P-256, P-384 or P-521), unencrypted."""

    def __init__(self, path: Path) -> None:
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise InvalidSettings(
                f"EDGEKILN_SIGNING_KEY_FILE={path}: no readable private key ({type(error).__name__})."
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.key_size not in _HASHES:
            raise InvalidSettings(f"EDGEKILN_SIGNING_KEY_FILE={path}: the key must be of P-256, P-384 or P-521.")
        self._key = key

    def sign(self, name: str, digests: Mapping[str, str]) -> str:
        """Return the bundle, as text, for files (name -> SHA-256) that belong to the artifact `name`."""
        resources = [{"name": file, "algorithm": "sha256", "digest": digests[file]} for file in sorted(digests)]
        root = hashlib.sha256(b"".join(bytes.fromhex(each["digest"]) for each in resources)).hexdigest()
        statement = {
            "_type": _STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": root}}],
            "predicateType": _PREDICATE_TYPE,
            "predicate": {"serialization": _SERIALIZATION, "resources": resources},
        }
        payload = json.dumps(statement, sort_keys=True).encode()
        algorithm = ec.ECDSA(_HASHES[self._key.key_size](), deterministic_signing=True)
        signature = self._key.sign(_encode(payload), algorithm)
        bundle = {
            "mediaType": _MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": _hint(self._key.public_key())}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
        return json.dumps(bundle, sort_keys=True)


class Verifier:
    """A public key that signatures are held against."""

    def __init__(self, path: Path) -> None:
        try:
            key = serialization.load_pem_public_key(path.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise InvalidSettings(f"{path} is no readable public key in PEM ({type(error).__name__}).") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.key_size not in _HASHES:
            raise InvalidSettings(f"The public key in {path} must be of P-256, P-384 or P-521.")
        self._key = key

    def verify(self, name: str, bundle: bytes, digests: Mapping[str, str]) -> None:
        """Return if the bundle signs exactly these files (name -> SHA-256); raises `SignatureInvalid`."""
        try:
            payload, signature = _read_bundle(bundle)
            self._key.verify(signature, _encode(payload), ec.ECDSA(_HASHES[self._key.key_size]()))
            statement = json.loads(payload)
            signed = {each["name"]: each["digest"] for each in statement["predicate"]["resources"]}
        except InvalidSignature:
            raise SignatureInvalid(
                f"The signature of {name} was not made with the key that was given. Nothing was kept.", name=name
            ) from None
        except (ValueError, KeyError, TypeError, IndexError, binascii.Error):
            raise SignatureInvalid(f"The signature of {name} cannot be read. Nothing was kept.", name=name) from None
        if statement.get("predicateType") != _PREDICATE_TYPE or signed != dict(digests):
            raise SignatureInvalid(f"The signature of {name} is for other files. Nothing was kept.", name=name)


def _read_bundle(text: bytes) -> tuple[bytes, bytes]:
    document: dict[str, Any] = json.loads(text)
    envelope = document["dsseEnvelope"]
    if envelope["payloadType"] != _PAYLOAD_TYPE:
        raise ValueError("another kind of payload")
    payload = base64.b64decode(envelope["payload"], validate=True)
    return payload, base64.b64decode(envelope["signatures"][0]["sig"], validate=True)


def _encode(payload: bytes) -> bytes:
    """Return what is signed: DSSE's pre-authentication encoding."""
    kind = _PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()
