"""`edgekiln benchmark` and `fit`: measure what was published before, and say what it will take elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from service.commands import options
from service.commands.jobs import IdempotencyKey, Wait, finish_command, watch_job
from service.commands.output import print_json, print_table, say
from service.units import format_bytes

BENCHMARK_EPILOG = """Examples:

\b
  edgekiln benchmark art_1f0c9a2b3c4d5e6f --device any --wait
  edgekiln benchmark art_1f0c9a2b3c4d5e6f --device all,soc=SM8650 --backend cpu --backend gpu

`edgekiln job ID` shows the ids of a job's artifacts.
"""

FIT_EPILOG = """Examples:

\b
  edgekiln fit art_1f0c9a2b3c4d5e6f
  edgekiln fit art_1f0c9a2b3c4d5e6f --device 'kind=phone,ram_gib<=8' --backend gpu
"""

ArtifactId = Annotated[str, typer.Argument(metavar="ARTIFACT", help="An artifact's id, as `edgekiln job` shows it.")]


def benchmark(
    artifact_id: ArtifactId,
    device: options.Devices = None,
    backend: options.Backends = None,
    threads: options.Threads = None,
    smoke_prompts: options.SmokePrompts = None,
    profile: options.Profile = False,
    priority: options.Priority = None,
    wait: Wait = False,
    idempotency_key: IdempotencyKey = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Measure a published artifact, again or elsewhere, and print the id of the job that does.

    What it finds stands beside the artifact; the job that made that stays as it is.
    """
    options.require_known_devices(device or (), backend or ())
    asked = {"backends": backend, "threads": threads, "smoke_prompts": smoke_prompts, "priority": priority}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value not in (None, [])}
    with options.connect(url, api_key) as client:
        job = client.benchmark(artifact_id, device or (), idempotency_key=idempotency_key, profile=profile, **given)
        if wait:
            say(f"Job {job['id']}.")
            finish_command(watch_job(client, job["id"]), as_json)
    if as_json:
        print_json(job)
    else:
        print(job["id"])


_FIT_NUMBERS = ("RSS", "anonymous", "available")


def fit(
    artifact_id: ArtifactId,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="Which phones, by conditions. [default: all]")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="B", help="cpu, gpu or npu.")] = "cpu",
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Say whether an artifact will fit into the memory of phones, as far as measurements bear it."""
    options.require_known_devices([device] if device else [], [backend])
    with options.connect(url, api_key) as client:
        found = client.fit(artifact_id, device, backend)
    if as_json:
        print_json(found)
        return
    rows = [
        [
            each["id"],
            f"{each['name']} (virtual)" if each["kind"] == "virtual" else each["name"],
            each["verdict"].replace("_", " "),
            *(_range(each["predicted"].get(name)) for name in ("peak_rss_bytes", "peak_anon_bytes")),
            format_bytes(each["memory_available_bytes"]),
        ]
        for each in found["devices"]
    ]
    print_table(("serial", "device", "it", *_FIT_NUMBERS), rows, right=_FIT_NUMBERS)
    for each in found["devices"]:
        say(f"{each['id']}: {each['sentence']}")


def _range(found: Mapping[str, int] | None) -> str:
    if found is None:
        return "-"
    if found["low"] == found["high"]:
        return format_bytes(found["estimate"])
    return f"{format_bytes(found['low'])} to {format_bytes(found['high'])}"
