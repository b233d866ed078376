"""`edgekiln convert` on the example, as a user types it: every file, every figure, outside EdgeKiln, and again."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.acceptance.conftest import EXAMPLE, FORMATS, RECIPES, Conversion, Document, run_edgekiln

#: What a job's document holds at least.
JOB_FIELDS = {"id", "state", "variants", "steps"}
VARIANT_FIELDS = {"name", "engine", "recipe", "state", "error", "artifacts", "parity", "quality", "measurements"}
ARTIFACT_FIELDS = {"name", "kind", "sha256", "size_bytes", "url"}
STEP_FIELDS = {
    "kind",
    "key",
    "state",
    "reused",
    "attempts",
    "duration_s",
    "peak_rss_bytes",
    "peak_anon_bytes",
    "error",
}
SHARED_KINDS = {"fetch", "reference", "convert", "quantize", "bundle", "verify"}
#: Absolute, of 1: the accuracy that the two careful recipes may lose.
_TWO_POINTS = 0.02


@pytest.fixture
def job(conversion: Conversion) -> Document:
    """The first conversion."""
    return conversion.job


@pytest.fixture
def folder(conversion: Conversion) -> Path:
    """Where it ran."""
    return conversion.folder


def each_artifact(job: Document) -> list[tuple[Document, Document]]:
    return [(variant, artifact) for variant in job["variants"] for artifact in variant["artifacts"]]


def test_the_document_holds_every_field(job: Document) -> None:
    assert job.keys() >= JOB_FIELDS
    assert job["state"] == "succeeded"
    assert [variant["name"] for variant in job["variants"]] == list(RECIPES)
    for variant in job["variants"]:
        assert variant.keys() >= VARIANT_FIELDS
        assert (variant["engine"], variant["recipe"]) == ("reauthored", variant["name"])
        assert (variant["state"], variant["error"]) == ("succeeded", None)
        assert {artifact["kind"] for artifact in variant["artifacts"]} == set(FORMATS)
        assert variant["parity"]["max_abs_error"] >= 0
        assert variant["measurements"] == []
    for _, artifact in each_artifact(job):
        assert artifact.keys() >= ARTIFACT_FIELDS
    for step in job["steps"]:
        assert step.keys() >= STEP_FIELDS
        assert (step["state"], step["attempts"], step["reused"]) == ("succeeded", 1, False)
        if step["kind"] != "publish":
            assert step["duration_s"] > 0
            assert step["peak_rss_bytes"] > 0
            assert step["peak_anon_bytes"] > 0


def test_shared_work_is_done_once(job: Document) -> None:
    assert Counter(step["kind"] for step in job["steps"]) == {
        "resolve": 1,
        "fetch": 1,
        "plan": 1,
        "reference": 1,
        "convert": 1,
        "quantize": len(RECIPES),
        "bundle": len(RECIPES) * 2,
        "verify": len(RECIPES) * len(FORMATS),
        "publish": len(RECIPES),
    }


def test_careful_recipes_stay_within_two_points_of_the_source(job: Document) -> None:
    for variant in job["variants"]:
        assert set(variant["quality"]["by_format"]) == set(FORMATS)
        for kind, quality in variant["quality"]["by_format"].items():
            assert quality["source_exact_match"] > 0.9, "the example is a model that can add"
            if variant["recipe"] != "dynamic_int4":
                loss = quality["source_exact_match"] - quality["exact_match"]
                assert loss <= _TWO_POINTS, (variant["name"], kind)


def test_files_are_what_the_document_says(job: Document, folder: Path) -> None:
    expected = set()
    for variant, artifact in each_artifact(job):
        path = Path(artifact["path"])
        expected |= {path.name, f"{path.name}.manifest.json"}
        assert path.parent == folder / "out"
        assert variant["name"] in path.name
        assert path.suffix == f".{artifact['kind']}"
        assert path.stat().st_size == artifact["size_bytes"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == artifact["sha256"]
        text = path.with_name(f"{path.name}.manifest.json").read_bytes()
        assert hashlib.sha256(text).hexdigest() == artifact["manifest_sha256"]
        manifest = json.loads(text)
        assert manifest["artifact"]["sha256"] == artifact["sha256"]
        assert manifest["variant"]["recipe"] == variant["recipe"]
    assert {path.name for path in (folder / "out").iterdir()} == expected


def test_bundles_answer_outside_edgekiln(job: Document, folder: Path) -> None:
    """The published files add in `litert_lm` itself."""
    for variant, artifact in each_artifact(job):
        if artifact["kind"] == "tflite" or variant["recipe"] == "dynamic_int4":
            continue
        assert ask_outside(folder, Path(artifact["path"]), "12+7=") == "19", artifact["name"]


ASK = """
import sys
import litert_lm
with (
    litert_lm.Engine(sys.argv[1], cache_dir=sys.argv[3]) as engine,
    engine.create_session(apply_prompt_template=False) as session,
):
    session.run_prefill([sys.argv[2]])
    print(session.run_decode().texts[0])
"""


def ask_outside(folder: Path, artifact: Path, prompt: str) -> str:
    """Return what a bundle answers to a bare prompt, in a process where EdgeKiln cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", ASK, str(artifact), prompt, str(folder / "tmp")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[0].strip()


def test_the_same_again_reuses_all_shared_work(conversion: Conversion, job: Document, folder: Path) -> None:
    again = run_edgekiln(folder, *conversion.arguments)
    assert again["state"] == "succeeded"
    assert again["id"] != job["id"]
    assert {step["kind"]: step["reused"] for step in again["steps"]} == {
        step["kind"]: step["kind"] in SHARED_KINDS for step in job["steps"]
    }
    assert [artifact["sha256"] for _, artifact in each_artifact(again)] == [
        artifact["sha256"] for _, artifact in each_artifact(job)
    ]
    # Manifests hold nothing that differs from run to run.
    assert [artifact["manifest_sha256"] for _, artifact in each_artifact(again)] == [
        artifact["manifest_sha256"] for _, artifact in each_artifact(job)
    ]


def test_a_manifests_command_makes_the_artifact_again(job: Document, folder: Path) -> None:
    _, artifact = next(pair for pair in each_artifact(job) if pair[1]["name"].endswith("dynamic_int8.litertlm"))
    manifest = json.loads(Path(artifact["manifest_path"]).read_text())
    program, *words = shlex.split(manifest["command"])
    assert program == "edgekiln"
    words[words.index("-o") + 1] = str(folder / "again")
    repeated = run_edgekiln(folder, *words)
    ((_, made),) = each_artifact(repeated)
    assert made["sha256"] == artifact["sha256"]
    assert Path(made["path"]).read_bytes() == Path(artifact["path"]).read_bytes()


def test_the_traced_engine_converts_the_same_checkpoint(job: Document, folder: Path) -> None:
    out = str(folder / "traced")
    traced = run_edgekiln(
        folder, "convert", str(EXAMPLE), "-o", out, "--engine", "traced", "--recipe", "none", "--format", "litertlm"
    )
    (variant,) = traced["variants"]
    assert (variant["engine"], variant["state"]) == ("traced", "succeeded")
    reused = {step["kind"]: step["reused"] for step in traced["steps"]}
    assert (reused["fetch"], reused["reference"], reused["convert"]) == (True, True, False)
    ((_, artifact),) = each_artifact(traced)
    assert artifact["sha256"] not in {other["sha256"] for _, other in each_artifact(job)}
    assert ask_outside(folder, Path(artifact["path"]), "12+7=") == "19"
