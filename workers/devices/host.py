"""Step `benchmark` on this host: the first device.

Owns starting fresh processes, watching their memory and turning their answers into one measurement. The first
process builds the runtime's caches and reads the file from disk: it is the figure `cold` and is never pooled. Called by
`workers.runner`, or by hand: `python -m workers.devices.host --input artifact=DIR --params '{...}' -o OUT`.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import workers
from service.errors import BenchmarkFailed
from service.recipes import FORMATS, require_known
from workers.devices.conditions import describe_host, describe_tools, read_conditions, read_process_memory
from workers.devices.statistics import Verdict, judge, percentiles, summarize, worst
from workers.steps import Progress, run_by_hand

_DEFAULTS: dict[str, Any] = {
    "device": "host",
    "processes": 5,
    "prefill_tokens": 128,
    "decode_tokens": 128,
    "threads": None,
    "process_deadline_s": 600.0,
}
#: Figures of a bundle, one sample a process.
_BUNDLE_FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "init_s")
#: Anonymous memory has no high-water mark in the kernel, so it is sampled this often.
_MEMORY_PERIOD_S = 0.02
_LOG_LINES = 20
#: How the runtimes begin a line that says what went wrong.
_ERROR_LINE = re.compile(r"E\d{4} .*?\] (.*)|ERROR: (.*)|(\w*Error: .*)")
#: The module that is run in each fresh process.
INSTRUMENT = "workers.devices.instrument"


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Measure `model.<format>` in `inputs["artifact"]` and return one measurement; see `StepFunction`.

    `params`: `format`, and optionally `processes` (5, beside the cold one), `prefill_tokens`, `decode_tokens`,
    `threads` (default: the usable cores), `process_deadline_s`. Writes `samples.json`: every sample of every
    process. Raises `BenchmarkFailed` when a process fails, hangs, or reports a missing or zero figure.
    """
    asked = _read_params(params)
    model = (inputs["artifact"] / f"model.{asked['format']}").absolute()
    if not model.is_file():
        raise BenchmarkFailed(f"There is no {model.name} in {inputs['artifact']} to benchmark.")
    device = {**describe_host(), "tools": describe_tools("ai-edge-litert", "litert-lm")}
    before = read_conditions()
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        for number in range(asked["processes"] + 1):
            label = "cold process" if number == 0 else f"process {number} of {asked['processes']}"
            progress(f"benchmark {model.name} on the host: {label}", number / (asked["processes"] + 1))
            samples.append(_measure_once(asked, model, Path(scratch), label))
    conditions = {"before": before, "after": read_conditions()}
    document = {"device": device, "conditions": conditions, "request": asked, "cold": samples[0], "warm": samples[1:]}
    (output_dir / "samples.json").write_text(json.dumps(document, indent=1))
    figures = _summarize(asked, samples[0], samples[1:])
    return {
        "device": device,
        "conditions": conditions,
        "backend": "cpu",
        "threads": asked["threads"],
        "format": asked["format"],
        **figures,
    }


def _read_params(params: Mapping[str, Any]) -> dict[str, Any]:
    asked = {**_DEFAULTS, **{name: value for name, value in params.items() if value is not None}}
    require_known("format", asked["format"], FORMATS)
    require_known("device", asked["device"], ("host",))
    if asked["threads"] is None:
        asked["threads"] = len(os.sched_getaffinity(0))
    return asked


def _measure_once(asked: Mapping[str, Any], model: Path, scratch: Path, label: str) -> dict[str, Any]:
    """Run one fresh process to its end and return its sample, checked."""
    cache = scratch / "cache"
    cache.mkdir(exist_ok=True)
    request, answer, log = scratch / "request.json", scratch / "answer.json", scratch / "log"
    answer.unlink(missing_ok=True)
    # The runtime would write its cache beside the model, which is an input and not ours to write to.
    request.write_text(json.dumps({**asked, "model": str(model), "cache_dir": str(cache)}))
    sources = str(Path(workers.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [sources, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", INSTRUMENT, str(request), str(answer)]
    started_s = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=scratch
        )
        peak_anon_bytes = _watch(process, asked["process_deadline_s"])
    wall_s = time.monotonic() - started_s
    if peak_anon_bytes is None:
        reason = f"did not end within {asked['process_deadline_s']:.0f} s"
        raise _fail(model, label, reason, log)
    if process.returncode != 0 or not answer.is_file():
        raise _fail(model, label, f"ended with status {process.returncode} and no answer", log)
    sample = {**json.loads(answer.read_text()), "wall_s": wall_s}
    # The process reads its own memory at its end too, which a short one may reach between two samples.
    sample["peak_anon_bytes"] = max(peak_anon_bytes, sample.get("peak_anon_bytes") or 0)
    fault = find_fault(sample, asked["format"])
    if fault:
        raise _fail(model, label, fault, log)
    return sample


def _watch(process: subprocess.Popen[bytes], deadline_s: float) -> int | None:
    """Wait for the process and return its peak anonymous memory in bytes, or kill it and return None when late."""
    end_s = time.monotonic() + deadline_s
    peak_anon_bytes = 0
    # Waiting on the handle costs the measured process nothing; Popen.wait with a timeout polls.
    handle = os.pidfd_open(process.pid)
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        while not poller.poll(_MEMORY_PERIOD_S * 1000):
            if time.monotonic() > end_s:
                return None
            found = read_process_memory(process.pid)
            if found is not None:
                peak_anon_bytes = max(peak_anon_bytes, found[1])
        return peak_anon_bytes
    finally:
        os.close(handle)
        process.kill()
        process.wait()


def find_fault(sample: Mapping[str, Any], model_format: str) -> str | None:
    """Say what is missing from a process's answer, or None: the runtimes report failures as zeros and exit with 0."""
    if model_format == "tflite":
        latency_ms = sample.get("latency_ms") or {}
        if not latency_ms:
            return "reported no signature"
        flat = {f"latency_ms of {name}": value for name, values in latency_ms.items() for value in values or [None]}
        flat["init_s"] = sample.get("init_s")
    else:
        flat = {name: sample.get(name) for name in (*_BUNDLE_FIGURES, "prefill_tokens", "decode_tokens")}
    for name in ("peak_rss_bytes", "peak_anon_bytes"):
        flat[name] = sample.get(name)
    for name, value in flat.items():
        if value is None:
            return f"reported no {name}"
        if not math.isfinite(value) or value <= 0:
            return f"reported {name} = {value}"
    return None


def _fail(model: Path, label: str, reason: str, log: Path) -> BenchmarkFailed:
    lines = log.read_text(errors="replace").splitlines()
    said = [next(filter(None, match.groups())) for line in lines if (match := _ERROR_LINE.match(line))]
    cause = f'The runtime said: "{said[-1]}". ' if said else ""
    return BenchmarkFailed(
        f"The benchmark of {model.name} on the host failed: the {label} {reason}. {cause}An artifact that runs "
        "reports positive figures: check that prefill and decode tokens fit its context.",
        log=lines[-_LOG_LINES:],
    )


def _summarize(asked: Mapping[str, Any], cold: Mapping[str, Any], warm: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"processes": len(warm)}
    if asked["format"] == "tflite":
        verdict = _summarize_graph(asked, warm, figures)
        figures["cold"] = {
            "init_s": cold["init_s"],
            "first_ms": {name: values[0] for name, values in cold["latency_ms"].items()},
        }
    else:
        verdict = _summarize_bundle(asked, warm, figures)
        figures["cold"] = {name: cold[name] for name in _BUNDLE_FIGURES}
    # The largest of all processes: memory is a peak, not a typical value.
    for name in ("peak_rss_bytes", "peak_anon_bytes"):
        figures[name] = max(sample[name] for sample in warm)
        figures["cold"][name] = cold[name]
    figures["verdict"] = str(verdict)
    return figures


def _summarize_bundle(asked: Mapping[str, Any], warm: Sequence[Mapping[str, Any]], figures: dict[str, Any]) -> Verdict:
    for name in _BUNDLE_FIGURES:
        figures[name] = summarize([sample[name] for sample in warm]).to_json()
    counts = ("prefill_tokens", "decode_tokens")
    figures.update({name: min(sample[name] for sample in warm) for name in counts})
    is_cut = any(figures[name] < asked[name] for name in counts)
    # Init and TTFT are shown, but throughput is what gates and comparisons read.
    return worst(
        judge([sample[name] for sample in warm], asked["processes"], is_cut=is_cut)
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s")
    )


def _summarize_graph(asked: Mapping[str, Any], warm: Sequence[Mapping[str, Any]], figures: dict[str, Any]) -> Verdict:
    figures["init_s"] = summarize([sample["init_s"] for sample in warm]).to_json()
    figures["latency_ms"] = {}
    verdicts = []
    for name in warm[0]["latency_ms"]:
        # One sample a process, its median: iterations of one process are not independent of each other.
        medians = [summarize(sample["latency_ms"][name]).median for sample in warm]
        every = [value for sample in warm for value in sample["latency_ms"][name]]
        figures["latency_ms"][name] = {**summarize(medians).to_json(), "iterations": percentiles(every)}
        verdicts.append(judge(medians, asked["processes"]))
    return worst(verdicts)


if __name__ == "__main__":
    raise SystemExit(run_by_hand(run, "Benchmark an artifact on this host."))
