"""A user's own files in one command: calibration text, prompts with answers, a text for perplexity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.acceptance.conftest import EXAMPLE, Conversion, Document, run_edgekiln

PAIRS = [json.loads(line) for line in (EXAMPLE / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
#: Fewer pairs than the checkpoint brings, and other ones for the text.
ASKED = 20
SUMS = " ".join(pair["prompt"] + pair["answer"] for pair in PAIRS[100:160])


@pytest.fixture(scope="module")
def job(conversion: Conversion, tmp_path_factory: pytest.TempPathFactory) -> Document:
    """A job on the checkpoint that was converted already, with files of the user's."""
    folder = tmp_path_factory.mktemp("files")
    evaluation, text = folder / "questions.jsonl", folder / "sums.txt"
    evaluation.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[:ASKED]), encoding="utf-8")
    text.write_text(SUMS, encoding="utf-8")
    given = ["--evaluation", evaluation, "--perplexity-text", text, "--calibration", text]
    return run_edgekiln(
        conversion.folder,
        *("convert", str(EXAMPLE), "-o", str(folder / "out"), "--recipe", "static_int8", "--format", "litertlm"),
        *map(str, given),
    ) | {"out": str(folder / "out")}


def test_the_files_are_what_the_artifact_is_measured_on(job: Document) -> None:
    (variant,) = job["variants"]
    assert variant["state"] == "succeeded"
    quality = variant["quality"]
    assert (quality["exact_match"], quality["exact_match_count"]) == (1.0, ASKED)
    assert quality["text_tokens"] > len(SUMS) // 2
    assert quality["text_perplexity"] == pytest.approx(quality["source_text_perplexity"], rel=0.1)


def test_the_conversion_itself_was_not_repeated(job: Document) -> None:
    reused = {step["kind"]: step["reused"] for step in job["steps"]}
    assert reused["convert"]
    assert not reused["quantize"]
    assert not reused["reference"]


def test_the_manifest_names_them_by_digest(job: Document) -> None:
    (path,) = Path(job["out"]).glob("*.manifest.json")
    manifest = path.read_text(encoding="utf-8")
    assert hashlib.sha256(SUMS.encode()).hexdigest() in manifest
    assert job["request"]["evaluation"] in manifest
