"""The protocol of a measurement, the same on every device: which processes run, and what their samples amount to.

    1. one process that nobody pools: the first ever on this device builds caches and reads the file (`cold`)
    2. what is asked beside the figures, in processes of its own, before time goes into nonsense: answers, a profile
    3. `processes` fresh ones, each after the device was found fit
    4. a capture that is noisy or hot is kept, marked, and run once more; the last one counts, whatever it says

Owns the order, the figures and the verdict; knows no device. A device gives `Device`: how one process is run, and how
one waits until it is fit. Called by `workers.devices.host` and `workers.devices.phone`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import DeviceHot
from workers.devices.statistics import Verdict, judge, percentiles, summarize, worst
from workers.steps import Progress

#: What becomes of a measurement besides its figures: every sample, the conditions, the commands, the raw logs.
DOCUMENT = "measurement.json"
#: Figures of a bundle, one sample a process.
BUNDLE_FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "init_s")
MEMORY_FIGURES = ("peak_rss_bytes", "peak_anon_bytes", "peak_pss_bytes")
#: Captures that are worth another try: what disturbed them may be over.
_RUN_AGAIN = (Verdict.NOISY, Verdict.HOT)


@dataclass(frozen=True)
class Aside:
    """What a device was asked beside its speed."""

    #: For the ledger.
    figures: Mapping[str, Any]
    #: For the document: all of it.
    whole: Mapping[str, Any]


@dataclass(frozen=True)
class Device:
    """What the protocol needs of a device."""

    #: As figures and documents name it, with its `kind`.
    record: Mapping[str, Any]
    #: Runs one fresh process to its end and returns its sample, checked; is told which one it is.
    run_process: Callable[[str], dict[str, Any]]
    #: How the device is now; `thermal_status` above 0 means that it holds its clocks down.
    read_conditions: Callable[[], dict[str, Any]]
    #: Waits until the device is fit to be measured, as long as it may take.
    wait_until_fit: Callable[[], None] = lambda: None
    #: Measures memory in a process of its own, where watching would disturb the others.
    measure_memory: Callable[[], dict[str, Any]] = dict
    #: Name -> what else is asked, each in processes of its own.
    asides: Mapping[str, Callable[[], Aside]] = field(default_factory=dict)


def measure(device: Device, asked: Mapping[str, Any], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Run the protocol and return one measurement's figures; writes `DOCUMENT` with all that they are made of.

    `asked`: `format`, `processes`, `threads`, `backend`, and for bundles `prefill_tokens` and `decode_tokens`.
    """
    before = device.read_conditions()
    captures: list[dict[str, Any]] = []
    total = asked["processes"] + 1

    def run(label: str, number: int) -> dict[str, Any]:
        again = "" if not captures else ", once more"
        progress(f"benchmark {asked['format']} on {device.record['name']}: {label}{again}", number / total)
        device.wait_until_fit()
        sample = device.run_process(label)
        return {**sample, "thermal_status": device.read_conditions().get("thermal_status")}

    cold = run("cold process", 0)
    asides = {name: ask() for name, ask in device.asides.items()}
    while not captures or (len(captures) == 1 and captures[0]["verdict"] in _RUN_AGAIN):
        try:
            warm = [run(f"process {number} of {asked['processes']}", number) for number in range(1, total)]
        except DeviceHot:
            if not captures:
                raise
            # The first capture stands, with its verdict.
            break
        figures, verdict = _summarize(asked, warm, captures[-1]["samples"] if captures else ())
        captures.append({"verdict": str(verdict), "figures": figures, "samples": warm})
    figures = {**captures[-1]["figures"], **device.measure_memory()}
    ran_on = {sample["ran_on"]: None for sample in captures[-1]["samples"] if "ran_on" in sample}
    found = {
        "device": dict(device.record),
        "backend": asked["backend"],
        # Where at least one process really ran, where that is not the backend that was asked for.
        **({"ran_on": " and ".join(ran_on)} if ran_on else {}),
        "threads": asked["threads"],
        "format": asked["format"],
        "conditions": {"before": before, "after": device.read_conditions()},
        **figures,
        "cold": _summarize_cold(asked, cold),
        **{name: dict(aside.figures) for name, aside in asides.items()},
        "captures": len(captures),
        "verdict": captures[-1]["verdict"],
    }
    whole = {name: dict(aside.whole) for name, aside in asides.items()}
    document = {**found, **whole, "asked": dict(asked), "cold_sample": cold, "captures": captures}
    (output_dir / DOCUMENT).write_text(json.dumps(document, indent=1))
    return found


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


def _summarize(asked: Mapping[str, Any], warm: _Samples, earlier: _Samples) -> tuple[dict[str, Any], Verdict]:
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


def _summarize_cold(asked: Mapping[str, Any], cold: Mapping[str, Any]) -> dict[str, Any]:
    memory = {name: cold[name] for name in MEMORY_FIGURES if cold.get(name)}
    if asked["format"] != "tflite":
        return {**{name: cold[name] for name in BUNDLE_FIGURES}, **memory}
    first_ms = {name: _first(found) for name, found in cold["latency_ms"].items()}
    return {"init_s": cold["init_s"], "first_ms": first_ms, **memory}


def _first(latency: Any) -> float:
    return float(latency["first"] if isinstance(latency, Mapping) else latency[0])
