"""Step `benchmark` on a phone, in two parts: what may be repeated, and what never is by itself.

    prepare   takes leftovers away, brings tool and model, checks their digests there, waits until the phone is cool
    measure   runs the tool, a fresh process a sample

Between the two the worker writes down that the tool is about to start. Owns the order; each way to run the artifact
(of `params["arms"]`, or the one that `backend` and `threads` say) is a `workers.devices.bench.Bench`. Called by
`workers.runner`. `params["phone"]` is what only the worker knows: `adb_host`, `adb_port`, `answer_s`, `serial`,
`record`, `run`, `cool_down_s`, `process_deadline_s`, `logit_range`, and `tool` (`name`, `version`, `abi`, `files`: name
-> SHA-256); `inputs["tool"]` holds its files, `inputs["answers"]` those that `workers.devices.smoke` needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.errors import EdgeKilnError
from workers.devices.adb import quote
from workers.devices.bench import Bench
from workers.devices.capture import measure_arms
from workers.devices.traces import digest_file, open_run, place_tool, push_checked, require_room
from workers.steps import Progress


def prepare(
    params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Make a phone ready to measure `model.<format>` of `inputs["artifact"]`; may be repeated at any time.

    Raises `DeviceLost`, `DeviceHung`, `DeviceUnauthorized`, `DeviceFull`, `DeviceHot`, `AdbUnavailable`, and
    `RequestUnfit` for what the tool cannot do.
    """
    benches = _make_benches(params, inputs, progress)
    bench = benches[0]
    bench.check_model()
    unfit = [error for each in benches if (error := each.find_unfit())]
    if len(unfit) == len(benches):
        raise unfit[0]
    bench.check_identity()
    open_run(bench.phone, bench.run)
    require_room(bench.phone, bench.model.stat().st_size, caches=len(benches))
    bench.phone.read(f"mkdir -p {quote(*(each.cache_dir for each in benches))}")
    progress("bringing the tool", 0.0)
    _, is_new = place_tool(bench.phone, inputs["tool"], bench.tool["files"])
    digest, size_bytes = digest_file(bench.model), bench.model.stat().st_size
    push_checked(
        bench.phone,
        bench.model,
        bench.remote_model,
        digest,
        on_bytes=lambda count: progress("bringing the model", count / size_bytes),
    )
    # The runtime names its caches by time and size: a model pushed within the same second would find another's.
    bench.phone.read(f"touch {quote(bench.remote_model)}")
    bench.wait_until_cool()
    return {"tool_was_new": is_new, "model_sha256": digest}


def measure(
    params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Measure what `prepare` has brought and return one measurement, see `capture.measure`; never repeated by itself.

    Where `params["arms"]` names several ways (`backend`, `threads`), `arms` holds a measurement of each, or an `error`.
    Raises `ToolReportInvalid` and `BenchmarkFailed` for what the tool says or does, `DeviceLost`, `DeviceHung` and
    `DeviceHot` for what becomes of the phone.
    """
    benches = _make_benches(params, inputs, progress)
    arms = [bench.make_arm() for bench in benches if not bench.find_unfit()]
    measured = iter(measure_arms(arms, benches[0].run, output_dir, progress))
    found = [bench.find_unfit() or next(measured) for bench in benches]
    errors = [each for each in found if isinstance(each, EdgeKilnError)]
    if len(errors) == len(found):
        raise errors[0]
    told = [bench.describe_outcome(each) for bench, each in zip(benches, found, strict=True)]
    return told[0] if len(told) == 1 else {"arms": told}


def _make_benches(params: Mapping[str, Any], inputs: Mapping[str, Path], progress: Progress) -> list[Bench]:
    """Return a bench for every arm that is asked for."""
    arms = params.get("arms") or [{}]
    shared = {name: value for name, value in params.items() if name != "arms"}
    return [
        Bench({**shared, **arm}, inputs, progress, "cache" if number == 1 else f"cache-{number}")
        for number, arm in enumerate(arms, 1)
    ]
