"""`edgekiln benchmark`: measures what was published before."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from service.commands import options
from service.commands.jobs import IdempotencyKey, Wait, finish_command, watch_job
from service.commands.output import print_json, say

BENCHMARK_EPILOG = """Examples:

\b
  edgekiln benchmark art_1f0c9a2b3c4d5e6f --device any --wait
  edgekiln benchmark art_1f0c9a2b3c4d5e6f --device all,soc=SM8650 --backend cpu --backend gpu

`edgekiln job ID` shows the ids of a job's artifacts.
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
