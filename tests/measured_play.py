"""Plays workers whose benchmarks found what a test says, and whose artifacts really are published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from service.ledger import claims, history
from service.ledger.blobs import OutputFile
from tests.api_world import StoredPlay, World
from tests.ledger_play import TOOLCHAIN
from workers.devices.statistics import summarize
from workers.publish import publish

#: What the default gates are satisfied with.
PROVEN: dict[str, Any] = {
    "context": {"unusable_tokens": 0},
    "parity": {
        "max_abs_error_ratio": 0.0,
        "top1_agreement_confident": 1.0,
        "top1_agreement_sure": 1.0,
        "confident_share": 1.0,
        "kl_mean": 0.0,
    },
    "generation": {"match_ratio": 1.0, "stops_missed": 0},
    "graph_generation": {"match_ratio": 1.0, "stops_missed": 0},
    "stop_tokens": {"missing": 0},
}
#: Decode speeds of six processes that differ by a percent, in tokens/s.
CALM = (100.0, 101.0, 99.0, 100.5, 99.5, 100.2)


def measured(samples: Sequence[float] = CALM, **fields: Any) -> dict[str, Any]:
    """Return figures of a bundle's measurement on a phone, with `samples` as its decode speeds."""
    return {
        "device": {"kind": "phone", "serial": "R5CT1", "name": "Acme One", "tool": {"name": "tool", "version": "1"}},
        "backend": "cpu",
        "threads": 4,
        "format": "litertlm",
        "prefill_tokens": 128,
        "decode_tokens": 128,
        "decode_tokens_per_s": summarize(samples).to_json(),
        "prefill_tokens_per_s": summarize([10 * sample for sample in samples]).to_json(),
        "ttft_s": summarize([20 / sample for sample in samples]).to_json(),
        "peak_anon_bytes": 100_000_000,
        "captures": 1,
        "verdict": "stable",
        **fields,
    }


class MeasuredPlay(StoredPlay):
    """One worker; the next benchmark finds `next_figures`."""

    def __init__(self, world: World, tenant_id: str = "default") -> None:
        super().__init__(world.database, world.store, tenant_id)
        self.source = world.source
        self.next_figures: dict[str, Any] = measured()
        self.regression_share = world.settings.regression_share

    def find_figures(self, claim: claims.Claim) -> dict[str, Any]:
        if claim.kind == "verify":
            return {"format": claim.params["format"], "size_bytes": 1, **PROVEN}
        return self.next_figures if claim.kind == "benchmark" else super().find_figures(claim)

    def find_regressions(self, claim: claims.Claim) -> Sequence[Mapping[str, Any]]:
        return history.find_regressions(self.database, claim, self.next_figures, self.regression_share)

    def finish(self, claim: claims.Claim, outputs: Sequence[OutputFile] | None = None) -> None:
        if claim.kind == "benchmark":
            outputs = [self.put("measurement.json", json.dumps(self.next_figures).encode())]
        super().finish(claim, outputs)

    def publish(self, claim: claims.Claim) -> None:
        publish(self.database, self.store, claim, TOOLCHAIN)

    def measure(self, figures: Mapping[str, Any], **fields: Any) -> str:
        """Submit a job whose benchmark finds `figures`, do all its work as the worker does, and return its id."""
        self.next_figures = dict(figures)
        job_id = self.submit(self.source["path"], recipes=["none"], formats=["litertlm"], devices=["host"], **fields)
        self.run_all()
        return job_id
