"""Signed publications over REST, the SDK and the command: verified, or refused before anything is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.client import Client
from service.errors import SignatureInvalid
from service.ledger import claims, publications
from service.signing import Signer
from tests.api_world import StoredPlay, World
from tests.unit.service.test_signing import write_keys
from workers.publish import _sign

Run = Callable[..., Any]


class SigningPlay(StoredPlay):
    """Workers whose operator has set a key."""

    signer: Signer

    def publish(self, claim: claims.Claim) -> None:
        record = publications.record_publications

        def record_signed(database: Any, claim: claims.Claim, drafts: Any) -> Any:
            return record(database, claim, [replace(draft, signature=_sign(draft, self.signer)) for draft in drafts])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(publications, "record_publications", record_signed)
            super().publish(claim)


def make_job(world: World, url: str, signer: Signer | None) -> str:
    with Client(url) as kiln:
        job_id = str(kiln.submit(source=world.source, recipes=["none"], formats=["tflite", "litertlm"])["id"])
    play = world.play()
    if signer is not None:
        play = SigningPlay(world.database, world.store)
        play.signer = signer
    play.run_all()
    return job_id


def test_what_is_signed_is_verified_and_kept_beside_the_manifest(world: World, url: str, run: Run) -> None:
    private, public = write_keys(world.folder)
    job_id = make_job(world, url, Signer(private))
    out = world.folder / "out"
    done = run("download", job_id, "-o", out, "--verify-key", public, "--json")
    assert done.exit_code == 0, done.stderr
    names = {Path(path).name for path in json.loads(done.stdout)}
    assert {path.name for path in out.iterdir()} == {
        f"{name}{suffix}" for name in names for suffix in ("", ".manifest.json", ".manifest.json.sig")
    }
    # Without the key it is kept all the same, for whoever verifies later.
    assert run("download", job_id, "-o", world.folder / "again").exit_code == 0
    assert len(list((world.folder / "again").glob("*.sig"))) == 2


@pytest.mark.parametrize("case", ["another key", "no signature", "no key"])
def test_what_is_not_signed_with_the_key_is_refused_and_not_kept(world: World, url: str, run: Run, case: str) -> None:
    private, public = write_keys(world.folder)
    job_id = make_job(world, url, None if case == "no signature" else Signer(private))
    if case == "another key":
        (world.folder / "other").mkdir()
        _, public = write_keys(world.folder / "other")
    if case == "no key":
        public.write_text("nothing")
    out = world.folder / "out"
    refused = run("download", job_id, "-o", out, "--verify-key", public)
    assert refused.exit_code != 0
    assert refused.stderr.partition(":")[0] == ("invalid_settings" if case == "no key" else "signature_invalid")
    assert not out.exists() or list(out.iterdir()) == []
    # Control: without the demand it is downloaded.
    assert run("download", job_id, "-o", out).exit_code == 0


def test_a_server_that_lies_about_an_artifact_is_found_out(world: World, url: str) -> None:
    private, public = write_keys(world.folder)
    job_id = make_job(world, url, Signer(private))
    with Client(url) as kiln:
        one, other = kiln.artifacts(job_id)
        swapped = {**one, "sha256": other["sha256"], "size_bytes": other["size_bytes"], "url": other["url"]}
        with pytest.raises(SignatureInvalid):
            kiln.download(swapped, world.folder / "out", verify_key=public)
        assert kiln.download(swapped, world.folder / "out"), "control: nobody else would notice"
