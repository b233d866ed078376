"""Counts what a storm has left, from the ledger and the store, and says it as a table."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import BlobCorrupt, BlobMissing
from service.ledger.database import Database
from service.ledger.states import FINAL_JOB_STATES
from service.storage import ObjectStore, blob_digest, blob_key, manifest_key, read_object
from tests.chaos.light_steps import MODEL_FILE, make_artifact
from tests.chaos.orders import FATES, Order
from tests.ledger_invariants import LedgerRows, find_stale_writes, find_violations, read_ledger


@dataclass(frozen=True)
class Census:
    """What was found; everything in `faults` must be 0."""

    counts: Mapping[str, int]
    faults: Mapping[str, int]
    #: The first few of each fault, in words.
    examples: tuple[str, ...]

    def __str__(self) -> str:
        rows = [*self.counts.items(), *self.faults.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join([*(f"  {name:<{width}}  {count:>8,}" for name, count in rows), *self.examples])


def take_census(database: Database, store: ObjectStore, orders: Mapping[str, Order]) -> Census:
    """Compare what was ordered (job id -> order) with what ledger and store hold."""
    rows = read_ledger(database)
    stored = {digest for found in store.list("blobs/") if (digest := blob_digest(found.key)) is not None}
    found = {
        "lost": _find_lost(rows, orders),
        "ended otherwise": _find_ended_otherwise(rows, orders),
        "duplicate publishes": _find_duplicates(rows, store),
        "stale writes": find_stale_writes(rows),
        "other broken invariants": sorted(set(find_violations(rows, stored)) - set(find_stale_writes(rows))),
        "wrong artifacts": _find_wrong_artifacts(rows, store, orders),
    }
    attempts = Counter(f"attempts {attempt['state']}" for attempt in rows["attempts"])
    counts = {
        "jobs": len(rows["jobs"]),
        **{f"jobs {state}": count for state, count in sorted(Counter(job["state"] for job in rows["jobs"]).items())},
        "steps": len(rows["job_steps"]),
        "steps that were shared": sum(link["reused"] for link in rows["job_steps"]),
        **dict(sorted(attempts.items())),
        "artifacts published": sum(row["published_at"] is not None for row in rows["publications"]),
    }
    examples = tuple(f"  {name}: {each}" for name, each_found in found.items() for each in each_found[:5])
    return Census(counts, {name: len(each_found) for name, each_found in found.items()}, examples)


def _find_lost(rows: LedgerRows, orders: Mapping[str, Order]) -> list[str]:
    states = {job["id"]: job["state"] for job in rows["jobs"]}
    lost = [f"{job_id} is not there" for job_id in orders if job_id not in states]
    return lost + [f"{job_id} is {state}" for job_id, state in states.items() if state not in FINAL_JOB_STATES]


def _find_ended_otherwise(rows: LedgerRows, orders: Mapping[str, Order]) -> list[str]:
    found = [f"{job['id']} was never ordered" for job in rows["jobs"] if job["id"] not in orders]
    errors = {variant["job_id"]: variant["error"] for variant in rows["variants"]}
    for job in rows["jobs"]:
        if job["id"] in orders and job["state"] in FINAL_JOB_STATES:
            fate = orders[job["id"]].fate
            if job["state"] != FATES[fate]:
                found.append(f"{job['id']}, fated to be {fate}, is {job['state']}: {errors[job['id']]}")
    return found


def _find_duplicates(rows: LedgerRows, store: ObjectStore) -> list[str]:
    """A variant is published once: in one row, by one success of one step, with one manifest in the store."""
    published = [row for row in rows["publications"] if row["published_at"] is not None]
    found = [
        f"{variant_id} has {count} publications of {kind}"
        for (variant_id, kind), count in Counter((row["variant_id"], row["kind"]) for row in published).items()
        if count > 1
    ]
    announced = Counter(
        event["data"]["step_id"]
        for event in rows["events"]
        if event["kind"] == "step" and event["data"]["kind"] == "publish" and event["data"]["state"] == "succeeded"
    )
    found += [f"publish {step_id} was announced {count} times" for step_id, count in announced.items() if count > 1]
    named = {manifest_key(row["manifest_digest"]) for row in rows["publications"]}
    found += [f"{item.key} is nobody's" for item in store.list("manifests/") if item.key not in named]
    return found


def _find_wrong_artifacts(rows: LedgerRows, store: ObjectStore, orders: Mapping[str, Order]) -> list[str]:
    """Read what anybody could download, and compare it with what the checkpoint must become."""
    found = []
    for row in rows["publications"]:
        if row["published_at"] is None or row["job_id"] not in orders:
            continue
        model = (orders[row["job_id"]].folder / MODEL_FILE).read_bytes()
        expected = hashlib.sha256(make_artifact(model, "none")).hexdigest()
        try:
            read_object(store, blob_key(row["digest"]), expected)
            manifest = read_object(store, manifest_key(row["manifest_digest"]), row["manifest_digest"])
        except (BlobMissing, BlobCorrupt) as error:
            found.append(f"{row['name']} of {row['job_id']}: {error}")
            continue
        if manifest.decode() != row["manifest"]:
            found.append(f"{row['name']} of {row['job_id']} has another manifest in the ledger than in the store")
    return found
