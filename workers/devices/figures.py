"""What the samples of a capture amount to: figures and a verdict, or what a sample lacks. Pure.

Called by `workers.devices.capture`, and by each device on every sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from workers.devices.statistics import Verdict, judge, percentiles, summarize, worst

#: Figures of a bundle, one sample a process.
BUNDLE_FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "init_s")
MEMORY_FIGURES = ("peak_rss_bytes", "peak_anon_bytes", "peak_pss_bytes")


def find_fault(sample: Mapping[str, Any], model_format: str, memory: Sequence[str] = ()) -> str | None:
    """Say what is missing from a process's answer, or None: the runtimes report failures as zeros and exit with 0."""
    if model_format == "tflite":
        latency_ms = sample.get("latency_ms") or {}
        if not latency_ms:
            return "reported no signature"
        flat = {f"latency_ms of {name}": value for name, found in latency_ms.items() for value in _flatten(found)}
        flat["init_s"] = sample.get("init_s")
    else:
        flat = {name: sample.get(name) for name in (*BUNDLE_FIGURES, "prefill_tokens", "decode_tokens")}
    for name in memory:
        flat[name] = sample.get(name)
    for name, value in flat.items():
        if value is None:
            return f"reported no {name}"
        if not math.isfinite(value) or value <= 0:
            return f"reported {name} = {value}"
    return None


def _flatten(latency: Any) -> list[Any]:
    if isinstance(latency, Mapping):
        return [latency.get("median", latency.get("avg"))]
    return list(latency) or [None]


_Samples = Sequence[Mapping[str, Any]]


def summarize_capture(asked: Mapping[str, Any], warm: _Samples, earlier: _Samples) -> tuple[dict[str, Any], Verdict]:
    """Return the figures and the verdict of a capture; `earlier` is the one that it repeats."""
    figures: dict[str, Any] = {"processes": len(warm)}
    if asked["format"] == "tflite":
        verdict = _summarize_graph(asked, warm, earlier, figures)
    else:
        verdict = _summarize_bundle(asked, warm, earlier, figures)
    # The largest of all processes: memory is a peak, not a typical value.
    for name in MEMORY_FIGURES:
        if all(sample.get(name) for sample in warm):
            figures[name] = max(sample[name] for sample in warm)
    if any(sample["thermal_status"] for sample in warm):
        verdict = worst([verdict, Verdict.HOT])
    return figures, verdict


def _summarize_bundle(asked: Mapping[str, Any], warm: _Samples, earlier: _Samples, figures: dict[str, Any]) -> Verdict:
    for name in BUNDLE_FIGURES:
        figures[name] = summarize([sample[name] for sample in warm]).to_json()
    counts = ("prefill_tokens", "decode_tokens")
    figures.update({name: min(sample[name] for sample in warm) for name in counts})
    is_cut = any(figures[name] < asked[name] for name in counts)
    # Init and TTFT are shown, but throughput is what gates and comparisons read.
    return worst(
        judge(
            [sample[name] for sample in warm],
            asked["processes"],
            is_cut=is_cut,
            earlier=[sample[name] for sample in earlier],
        )
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s")
    )


def _summarize_graph(asked: Mapping[str, Any], warm: _Samples, earlier: _Samples, figures: dict[str, Any]) -> Verdict:
    figures["init_s"] = summarize([sample["init_s"] for sample in warm]).to_json()
    figures["latency_ms"] = {}
    verdicts = []
    for name in warm[0]["latency_ms"]:
        # One sample a process, its median: iterations of one process are not independent of each other.
        medians = [_middle(sample["latency_ms"][name]) for sample in warm]
        figures["latency_ms"][name] = summarize(medians).to_json()
        every = [value for sample in warm if isinstance(found := sample["latency_ms"][name], list) for value in found]
        if every:
            figures["latency_ms"][name]["iterations"] = percentiles(every)
        before = [_middle(sample["latency_ms"][name]) for sample in earlier]
        verdicts.append(judge(medians, asked["processes"], less_is_better=True, earlier=before))
    return worst(verdicts)


def _middle(latency: Any) -> float:
    """A process's median: of its iterations where the tool tells them, else the one that the tool tells."""
    if isinstance(latency, Mapping):
        return float(latency.get("median", latency["avg"]))
    return summarize(latency).median


def summarize_cold(asked: Mapping[str, Any], cold: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of the process that nobody pools."""
    memory = {name: cold[name] for name in MEMORY_FIGURES if cold.get(name)}
    if asked["format"] != "tflite":
        return {**{name: cold[name] for name in BUNDLE_FIGURES}, **memory}
    first_ms = {name: _first(found) for name, found in cold["latency_ms"].items()}
    return {"init_s": cold["init_s"], "first_ms": first_ms, **memory}


def _first(latency: Any) -> float:
    return float(latency["first"] if isinstance(latency, Mapping) else latency[0])
