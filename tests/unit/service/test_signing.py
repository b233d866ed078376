"""Signatures: what is signed, by whom, and that model-signing's form is met in both directions."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from service.errors import InvalidSettings, SignatureInvalid
from service.signing import Signer, Verifier

NAME = "a.tflite"
FILES = {
    "a.tflite": hashlib.sha256(b"weights\n").hexdigest(),
    "a.tflite.manifest.json": hashlib.sha256(b'{"x":1}\n').hexdigest(),
}
#: `model_signing sign key` 1.1.1 of a folder with these two files, and the public half of its key.
THEIR_KEY = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEOu2lHOSkefYWTVc1oJoTrCM+UlOv
IEthhWH3rirKZ/8wwvjC/7kulQenqKki6ibPIET6zkt1siW2JeKXG/h/8g==
-----END PUBLIC KEY-----
"""
THEIR_PAYLOAD = (
    "ewogICJfdHlwZSI6ICJodHRwczovL2luLXRvdG8uaW8vU3RhdGVtZW50L3YxIiwKICAic3ViamVjdCI6IFsKICAgIHsKICAgICAg"
    "Im5hbWUiOiAiYXJ0IiwKICAgICAgImRpZ2VzdCI6IHsKICAgICAgICAic2hhMjU2IjogIjFjZDRkNjNiODJmOWFkYTY1NjM1Y2I1"
    "NmMzMzE4ZDkzNGUxZDlkMzBiM2E1Yzk4ODAwMzFkNDJmZTVmMTMwMzEiCiAgICAgIH0KICAgIH0KICBdLAogICJwcmVkaWNhdGVU"
    "eXBlIjogImh0dHBzOi8vbW9kZWxfc2lnbmluZy9zaWduYXR1cmUvdjEuMCIsCiAgInByZWRpY2F0ZSI6IHsKICAgICJyZXNvdXJj"
    "ZXMiOiBbCiAgICAgIHsKICAgICAgICAiYWxnb3JpdGhtIjogInNoYTI1NiIsCiAgICAgICAgImRpZ2VzdCI6ICIxYjQ2NWZhNmI2"
    "YmNiYzA2YTMxOTllM2QyZDhhZWMzNWQzNzQ5NGE3MTJmODg4YjZkNTUzNjY4NGRkODlkMGYwIiwKICAgICAgICAibmFtZSI6ICJh"
    "LnRmbGl0ZSIKICAgICAgfSwKICAgICAgewogICAgICAgICJhbGdvcml0aG0iOiAic2hhMjU2IiwKICAgICAgICAiZGlnZXN0Ijog"
    "ImJiMTU3ODYxYTE2NGUzNWNkZGU5ZDcyNmIwYWY5Y2UyNzY1YThmNTMwYzM1ZDllNDU3MzJiOTRlZTY1ZTk1NTciLAogICAgICAg"
    "ICJuYW1lIjogImEudGZsaXRlLm1hbmlmZXN0Lmpzb24iCiAgICAgIH0KICAgIF0sCiAgICAic2VyaWFsaXphdGlvbiI6IHsKICAg"
    "ICAgIm1ldGhvZCI6ICJmaWxlcyIsCiAgICAgICJhbGxvd19zeW1saW5rcyI6IGZhbHNlLAogICAgICAiaWdub3JlX3BhdGhzIjog"
    "WwogICAgICAgICIuZ2l0IiwKICAgICAgICAiLmdpdGF0dHJpYnV0ZXMiLAogICAgICAgICIuZ2l0aWdub3JlIiwKICAgICAgICAi"
    "LmdpdGh1YiIKICAgICAgXSwKICAgICAgImhhc2hfdHlwZSI6ICJzaGEyNTYiCiAgICB9CiAgfQp9"
)
THEIR_SIGNATURE = "MEQCIE/FhIXAiWdOSxpDB8wrLk2gbszcy4lHnXS0TiEf4d1IAiAGcoQ+mFAtv/n9U4ka5k6X4DmFp/euvUn49pfsmcJRPw=="


def write_keys(folder: Path, key: Any = None) -> tuple[Path, Path]:
    """Write a private and a public key; return the paths."""
    made = key or ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "private.pem", folder / "public.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(made.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(made.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_a_signature_holds_for_its_files_and_is_always_the_same(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    private, public = write_keys(tmp_path, ec.generate_private_key(curve))
    bundle = Signer(private).sign(NAME, FILES)
    assert Signer(private).sign(NAME, dict(reversed(FILES.items()))) == bundle
    Verifier(public).verify(NAME, bundle.encode(), FILES)


@pytest.mark.parametrize(
    "others",
    [
        {**FILES, NAME: "0" * 64},
        {NAME: FILES[NAME]},
        {**FILES, "b": "0" * 64},
        {"b.tflite": FILES[NAME], "a.tflite.manifest.json": FILES["a.tflite.manifest.json"]},
    ],
    ids=["digest", "fewer", "more", "name"],
)
def test_a_signature_for_other_files_is_refused(tmp_path: Path, others: dict[str, str]) -> None:
    private, public = write_keys(tmp_path)
    bundle = Signer(private).sign(NAME, FILES).encode()
    with pytest.raises(SignatureInvalid, match="other files"):
        Verifier(public).verify(NAME, bundle, others)


def test_another_key_and_a_changed_statement_are_refused(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    bundle = Signer(private).sign(NAME, FILES)
    (tmp_path / "other").mkdir()
    _, other = write_keys(tmp_path / "other")
    with pytest.raises(SignatureInvalid, match="not made with the key"):
        Verifier(other).verify(NAME, bundle.encode(), FILES)
    document = json.loads(bundle)
    statement = base64.b64decode(document["dsseEnvelope"]["payload"]).replace(FILES[NAME].encode(), b"0" * 64)
    document["dsseEnvelope"]["payload"] = base64.b64encode(statement).decode()
    with pytest.raises(SignatureInvalid, match="not made with the key"):
        Verifier(public).verify(NAME, json.dumps(document).encode(), {**FILES, NAME: "0" * 64})


@pytest.mark.parametrize("text", [b"", b"no json", b"[]", b"{}", b'{"dsseEnvelope": {"payloadType": "x"}}', b"\xff"])
def test_what_is_no_signature_is_refused(tmp_path: Path, text: bytes) -> None:
    _, public = write_keys(tmp_path)
    with pytest.raises(SignatureInvalid, match="cannot be read"):
        Verifier(public).verify(NAME, text, FILES)


def test_what_model_signing_has_signed_is_verified(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text(THEIR_KEY)
    envelope = {
        "payload": THEIR_PAYLOAD,
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": THEIR_SIGNATURE}],
    }
    Verifier(tmp_path / "key.pem").verify(NAME, json.dumps({"dsseEnvelope": envelope}).encode(), FILES)


def test_our_statement_is_that_of_model_signing(tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    ours = json.loads(Signer(private).sign(NAME, FILES))
    assert ours["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    statement, theirs = (
        json.loads(base64.b64decode(payload)) for payload in (ours["dsseEnvelope"]["payload"], THEIR_PAYLOAD)
    )
    assert statement.keys() == theirs.keys()
    assert statement["predicateType"] == theirs["predicateType"]
    assert statement["subject"][0]["digest"] == theirs["subject"][0]["digest"]
    assert statement["predicate"]["resources"] == theirs["predicate"]["resources"]


def test_a_key_that_cannot_sign_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    private, public = write_keys(tmp_path, rsa.generate_private_key(65537, 2048))
    for path in (tmp_path / "text", tmp_path / "missing", private, public):
        with pytest.raises(InvalidSettings, match="EDGEKILN_SIGNING_KEY_FILE"):
            Signer(path)
    for path in (tmp_path / "text", public):
        with pytest.raises(InvalidSettings, match="public key"):
            Verifier(path)
