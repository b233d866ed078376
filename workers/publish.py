"""Step `publish`: judge the gates, write the manifests, make the artifacts visible.

Runs in the worker itself: it moves no user's bytes through a library. The artifacts' blobs are in the store
already; here come the manifests, in an order that leaves one publication whatever crashes: the ledger records
each manifest and its digest, the store receives it, and the caller's fenced finish makes it visible.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from service import gates
from service.devices import find_failed_arm, keep_one_kind, list_measured
from service.errors import BenchmarkFailed, GateRefused
from service.ledger import claims, publications
from service.ledger.database import Database
from service.ledger.keys import Toolchain, canonical_json
from service.requests import parse_stored_request, write_source
from service.signing import Signer, manifest_name
from service.storage import ObjectStore, blob_key, manifest_key

#: Version of the manifest's layout: add fields, never rename them.
MANIFEST_SCHEMA = "edgekiln/manifest/1"


def publish(
    database: Database, store: ObjectStore, claim: claims.Claim, toolchain: Toolchain, signer: Signer | None = None
) -> dict[str, Any]:
    """Publish a variant's artifacts and return the figures of the step.

    Raises `GateRefused` when a figure misses a gate, `LeaseLost`, and the store's errors (retryable).
    """
    # 1. judge
    figures = collect_figures(claim)
    verdicts = judge(claim.params, figures, find_unstable(claim))
    # 2. write the manifests and record them; those of an earlier attempt stay in force
    provenance = publications.read_provenance(database, claim)
    drafts = [_draft(kind, claim, provenance, toolchain, figures, verdicts) for kind in claim.params["formats"]]
    if signer is not None:
        drafts = [replace(draft, signature=_sign(draft, signer)) for draft in drafts]
    drafts = publications.record_publications(database, claim, drafts)
    for draft in drafts:
        # Nothing becomes visible whose bytes the store has lost.
        store.stat(blob_key(draft.digest))
    # 3. upload
    for draft in drafts:
        store.put_bytes(manifest_key(draft.manifest_digest), draft.manifest.encode())
    return {
        "verdicts": verdicts,
        "artifacts": [{"name": draft.name, "sha256": draft.digest} for draft in drafts],
    }


def collect_figures(claim: claims.Claim) -> dict[str, Any]:
    """Return the variant's worst figures over its formats, and its benchmarks' where a gate waits for them.

    Only stable measurements prove anything: where one of them is not, the worst is not known, and none is given.
    """
    merged = gates.merge_figures([supplier.figures for supplier in claim.inputs.values() if supplier.kind == "verify"])
    benchmarks = _read_benchmarks(claim)
    if benchmarks:
        merged["benchmark"] = {} if find_unstable(claim) else gates.merge_benchmarks(benchmarks)
    return merged


def find_unstable(claim: claims.Claim) -> list[Mapping[str, Any]]:
    """Return the measurements that a gate would have read, had they been stable."""
    return [figures for figures in _read_benchmarks(claim) if figures.get("verdict") != "stable"]


def _read_benchmarks(claim: claims.Claim) -> list[Mapping[str, Any]]:
    """Return the measurements that a gate reads. Raises `BenchmarkFailed` where an arm has none.

    The worst of what was measured is not the worst of what was asked for.
    """
    measured: list[Mapping[str, Any]] = []
    for supplier in claim.inputs.values():
        if supplier.kind == "benchmark":
            if failed := find_failed_arm(supplier.figures):
                raise BenchmarkFailed(f"A gate needs a figure that is missing: {failed['message']}")
            measured += list_measured(supplier.figures)
    return keep_one_kind(measured)


def judge(
    params: Mapping[str, Any], figures: Mapping[str, Any], unstable: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Hold the variant's figures against its gates; return the verdicts, or raise `GateRefused`.

    `unstable` are the measurements for whose sake figures of benchmarks are missing: the refusal names them.
    """
    verdicts = gates.judge(params["recipe"], figures, params["gates"])
    missed = [_blame(verdict, unstable) for verdict in verdicts if not verdict.passed]
    if missed:
        raise GateRefused(
            " ".join(verdict.sentence for verdict in missed),
            missed=[verdict.to_json() for verdict in missed],
        )
    return [verdict.to_json() for verdict in verdicts]


def _blame(verdict: gates.Verdict, unstable: Sequence[Mapping[str, Any]]) -> gates.Verdict:
    """Say of a missing figure of a benchmark that it was measured, and why that does not count."""
    if verdict.figure is not None or not verdict.figure_name.startswith("benchmark.") or not unstable:
        return verdict
    found = ", ".join(
        f"{figures.get('format')} on {(figures.get('device') or {}).get('name', 'a device')} was "
        f"{figures.get('verdict', 'not judged')}"
        for figures in unstable
    )
    sentence = (
        f"The gate {verdict.gate} reads stable measurements only, and {found}. Let the device cool down and rest, then "
        "retry the job."
    )
    return replace(verdict, sentence=sentence)


def _draft(
    kind: str,
    claim: claims.Claim,
    provenance: publications.Provenance,
    toolchain: Toolchain,
    figures: Mapping[str, Any],
    verdicts: Sequence[Mapping[str, Any]],
) -> publications.Draft:
    (output,) = claim.inputs[f"artifact_{kind}"].outputs
    request = parse_stored_request(provenance.request)
    name = f"{request.source.label}-{provenance.variant}.{kind}"
    manifest = canonical_json(
        {
            "schema": MANIFEST_SCHEMA,
            "artifact": {"name": name, "kind": kind, "sha256": output.digest, "size_bytes": output.size_bytes},
            "source": provenance.source,
            "checkpoint": _describe_checkpoint(claim.inputs["checkpoint"].figures),
            "variant": {
                "name": provenance.variant,
                "engine": claim.params["engine"],
                "recipe": claim.params["recipe"],
                "prefill_lengths": claim.inputs["convert"].params["prefill_lengths"],
                "context_length": claim.inputs["convert"].params["context_length"],
            },
            "steps": [_describe_step(step) for step in provenance.ancestors],
            "toolchain": {"id": toolchain.id, "versions": dict(toolchain.versions)},
            "isolation": _weakest(step.isolation for step in provenance.ancestors),
            "proof": {"figures": figures, "gates": list(verdicts)},
            "command": _repeat_command(kind, claim, provenance),
        }
    ).decode()
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    return publications.Draft(kind, name, output.digest, output.size_bytes, digest, manifest)


def _sign(draft: publications.Draft, signer: Signer) -> str:
    return signer.sign(draft.name, {draft.name: draft.digest, manifest_name(draft.name): draft.manifest_digest})


def _describe_checkpoint(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"digest": figures["checkpoint_digest"], "files": figures["files"]}


def _describe_step(step: publications.Ancestor) -> dict[str, Any]:
    return {
        "kind": step.kind,
        "key": step.key,
        "params": step.params,
        "inputs": step.inputs,
        "outputs": step.outputs,
        "revision": step.revision,
        "toolchain_id": step.toolchain_id,
    }


def _weakest(levels: Any) -> str:
    return "strong" if all(level == "strong" for level in levels) else "weak"


def _repeat_command(kind: str, claim: claims.Claim, provenance: publications.Provenance) -> str:
    """The command that makes this artifact again."""
    request = parse_stored_request(provenance.request)
    place = write_source(provenance.source, request.source)
    lengths = claim.inputs["convert"].params
    words = ["edgekiln", "convert", place, "-o", "out", "--engine", claim.params["engine"]]
    words += ["--recipe", claim.params["recipe"], "--format", kind]
    for length in lengths["prefill_lengths"]:
        words += ["--prefill", str(length)]
    words += ["--context", str(lengths["context_length"])]
    if request.ignore_custom_code:
        words.append("--ignore-custom-code")
    if "settings" in claim.params:
        settings = canonical_json(claim.params["settings"]).decode()
        words += ["--recipe-file", f"{claim.params['recipe']}={settings}"]
    for name, digest in request.uploads.items():
        words += [_upload_option(name, provenance), f"sha256:{digest}"]
    return shlex.join(words)


def _upload_option(name: str, provenance: publications.Provenance) -> str:
    is_prompts = name == "calibration" and provenance.request["calibration"]["kind"] == "prompts"
    return "--calibration-prompts" if is_prompts else f"--{name.replace('_', '-')}"
