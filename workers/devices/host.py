"""Step `benchmark` on this host.

Owns starting fresh processes and watching their memory; what they amount to is `workers.devices.capture`'s. Called by
`workers.runner`, or by hand: `python -m workers.devices.host --input artifact=DIR --params '{...}' -o OUT`.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import workers
from service.errors import BenchmarkFailed
from service.recipes import FORMATS, require_known
from workers.devices.capture import Device, measure
from workers.devices.conditions import describe_host, describe_tools, read_conditions, read_process_memory
from workers.devices.figures import find_fault
from workers.steps import Progress, run_by_hand

_DEFAULTS: dict[str, Any] = {
    "device": "host",
    "backend": "cpu",
    "processes": 5,
    "prefill_tokens": 128,
    "decode_tokens": 128,
    "threads": None,
    "process_deadline_s": 600.0,
}
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
    `threads` (default: the usable cores), `process_deadline_s`. Writes `measurement.json`: every sample of every
    process. Raises `BenchmarkFailed` when a process fails, hangs, or reports a missing or zero figure.
    """
    asked = _read_params(params)
    model = (inputs["artifact"] / f"model.{asked['format']}").absolute()
    if not model.is_file():
        raise BenchmarkFailed(f"There is no {model.name} in {inputs['artifact']} to benchmark.")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        device = Device(
            record={**describe_host(), "tools": describe_tools("ai-edge-litert", "litert-lm")},
            run_process=partial(_measure_once, asked, model, Path(scratch)),
            read_conditions=read_conditions,
        )
        return measure(device, asked, output_dir, progress)


def _read_params(params: Mapping[str, Any]) -> dict[str, Any]:
    asked = {**_DEFAULTS, **{name: value for name, value in params.items() if value is not None}}
    require_known("format", asked["format"], FORMATS)
    require_known("device", asked["device"], ("host",))
    require_known("backend", asked["backend"], ("cpu",))
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
    fault = find_fault(sample, asked["format"], ("peak_rss_bytes", "peak_anon_bytes"))
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


def _fail(model: Path, label: str, reason: str, log: Path) -> BenchmarkFailed:
    lines = log.read_text(errors="replace").splitlines()
    said = [next(filter(None, match.groups())) for line in lines if (match := _ERROR_LINE.match(line))]
    cause = f'The runtime said: "{said[-1]}". ' if said else ""
    return BenchmarkFailed(
        f"The benchmark of {model.name} on the host failed: the {label} {reason}. {cause}An artifact that runs "
        "reports positive figures: check that prefill and decode tokens fit its context.",
        log=lines[-_LOG_LINES:],
    )


if __name__ == "__main__":
    raise SystemExit(run_by_hand(run, "Benchmark an artifact on this host."))
