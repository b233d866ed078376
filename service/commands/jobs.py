"""Commands that speak to a server: submit, jobs, job, cancel, retry, delete, logs, download."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from service.commands import options
from service.commands.output import format_time, print_json, print_table, say
from service.commands.progress import ProgressView, label_step
from service.commands.report import exit_code, print_outcome, say_outcome
from service.errors import InvalidRequest
from service.units import format_bytes

if TYPE_CHECKING:
    from service.client import Client

SUBMIT_EPILOG = """Examples:

\b
  edgekiln submit HuggingFaceTB/SmolLM-135M --recipe dynamic_int8 --recipe float16 --wait
  edgekiln submit https://models.example.org/mine/ --recipe dynamic_int8
  edgekiln submit /srv/models/mine --idempotency-key nightly-2026-11-21
  edgekiln submit ./my-model --url https://kiln.example
  edgekiln submit OWNER/NAME@v1.2 --url http://kiln.example:8711 --api-key ek_...
"""
JOBS_EPILOG = """Examples:

\b
  edgekiln jobs
  edgekiln jobs --state failed --state partial --limit 100
  edgekiln jobs --json | jq -r '.[].id'
"""
JOB_EPILOG = """Examples:

\b
  edgekiln job job_1f0c9a2b3c4d5e6f
  edgekiln job job_1f0c9a2b3c4d5e6f --watch
"""
CANCEL_EPILOG = """Example:

\b
  edgekiln cancel job_1f0c9a2b3c4d5e6f
"""
RETRY_EPILOG = """Example:

\b
  edgekiln retry job_1f0c9a2b3c4d5e6f --wait
"""
DELETE_EPILOG = """Example:

\b
  edgekiln delete job_1f0c9a2b3c4d5e6f
"""
LOGS_EPILOG = """Examples:

\b
  edgekiln logs job_1f0c9a2b3c4d5e6f
  edgekiln logs job_1f0c9a2b3c4d5e6f --step convert | less
"""
DOWNLOAD_EPILOG = """Example:

\b
  edgekiln download job_1f0c9a2b3c4d5e6f -o out
"""

IdempotencyKey = Annotated[
    str | None, typer.Option("--idempotency-key", metavar="TEXT", help="Submit once, however often it is repeated.")
]
Wait = Annotated[bool, typer.Option("--wait", help="Show progress until the job has ended; the exit code tells how.")]


@options.takes_order
def submit(
    order: options.Order,
    wait: Wait = False,
    idempotency_key: IdempotencyKey = None,
    is_uploaded: Annotated[
        bool | None,
        typer.Option(
            "--upload/--no-upload",
            help="Upload a folder's files, or let the server read the folder. [default: upload unless the server is "
            "on this machine's loopback]",
            show_default=False,
        ),
    ] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Submit a job to a server and print its id."""
    with options.connect(url, api_key) as client:
        if is_uploaded or (is_uploaded is None and not client.is_local):
            order = order.with_folder_uploaded()
        job = client.submit(
            order.request,
            idempotency_key=idempotency_key,
            files=order.files,
            on_upload=lambda file: say(f"Uploading {file.name} ({format_bytes(file.stat().st_size)})."),
        )
        if wait:
            say(f"Job {job['id']}.")
            finish_command(watch_job(client, job["id"]), as_json)
    if as_json:
        print_json(job)
    else:
        print(job["id"])


def jobs(
    state: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="Only jobs in this state; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="At most so many.")] = 20,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """List jobs, newest first."""
    with options.connect(url, api_key) as client:
        found = list(itertools.islice(client.list(state or (), page_size=min(limit, 200)), limit))
    if as_json:
        print_json(found)
        return
    rows = [
        [
            job["id"],
            job["state"],
            name_source(job["request"]),
            _count(job["variant_states"]),
            format_time(job["created_at"]),
        ]
        for job in found
    ]
    print_table(("id", "state", "source", "variants", "submitted"), rows)


def name_source(request: Mapping[str, Any]) -> str:
    """Return the folder, the repository, the address or the upload that a request names; or what it measures of it."""
    if "artifact" in request:
        return f"{request['artifact']} of {name_source({'source': request['source']})}"
    source = request["source"]
    if source["kind"] == "s3":
        return f"s3://{source['bucket']}/{source['prefix']}"
    return str(source.get("path") or source.get("repo") or source.get("url") or source["name"] or source["kind"])


def _count(states: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def job(
    job_id: options.JobId,
    watch: Annotated[bool, typer.Option("--watch", help="Show progress until the job has ended.")] = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show a job.

    Its variants, artifacts, figures and steps.
    """
    with options.connect(url, api_key) as client:
        if watch:
            finish_command(watch_job(client, job_id), as_json)
        document = client.get(job_id)
    if as_json:
        print_json(document)
        return
    print_outcome(document)
    _print_artifacts(document)
    _print_steps(document)


def _print_artifacts(document: Mapping[str, Any]) -> None:
    artifacts = [artifact for variant in document["variants"] for artifact in variant["artifacts"]]
    if artifacts:
        print_table(("artifact", "id"), [[artifact["name"], artifact["id"]] for artifact in artifacts])


_STEP_WORDS = ("step", "state")
_STEP_NUMBERS = ("attempts", "time", "peak\nRSS", "peak\nanonymous", "\npredicted")


def _print_steps(document: Mapping[str, Any]) -> None:
    rows = [
        [
            label_step(step),
            f"{step['state']} (reused)" if step["reused"] else step["state"],
            str(step["attempts"]),
            "-" if step["duration_s"] is None else f"{step['duration_s']:.1f} s",
            format_bytes(step["peak_rss_bytes"]),
            format_bytes(step["peak_anon_bytes"]),
            format_bytes(step["predicted_peak_anon_bytes"]),
        ]
        for step in document["steps"]
    ]
    print_table((*_STEP_WORDS, *_STEP_NUMBERS), rows, right=_STEP_NUMBERS)


def cancel(job_id: options.JobId, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Cancel a job; what it published stays."""
    with options.connect(url, api_key) as client:
        say(f"Job {job_id}: {client.cancel(job_id)['state']}.")


def retry(
    job_id: options.JobId,
    wait: Wait = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Try again what did not succeed.

    Opens an ended job again for those variants; finished work is kept.
    """
    with options.connect(url, api_key) as client:
        seen = client.get(job_id)["event_count"]
        document = client.retry(job_id)
        if wait:
            finish_command(watch_job(client, job_id, seen), as_json)
    if as_json:
        print_json(document)
    else:
        say(f"Job {job_id}: {document['state']}.")


def delete(job_id: options.JobId, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Delete an ended job.

    Its artifacts and logs go with it. Disk is given back later, by `edgekiln gc` or by itself.
    """
    with options.connect(url, api_key) as client:
        client.delete(job_id)
    say(f"Job {job_id} is deleted.")


def logs(
    job_id: options.JobId,
    step: Annotated[
        str | None, typer.Option("--step", metavar="KIND", help="Only steps of this kind, e.g. convert.")
    ] = None,
    is_followed: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on printing until the job has ended.")
    ] = False,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Print what a job's steps wrote; of those that run, the last lines.

    Example: edgekiln logs job_1f0c9a2b3c4d5e6f --step convert --follow
    """
    if is_followed and as_json:
        raise InvalidRequest("--follow prints text; leave --json out, or read `GET /v1/jobs/ID/events`.")
    with options.connect(url, api_key) as client:
        if is_followed:
            for text in client.follow_logs(job_id, step):
                sys.stdout.write(text)
                sys.stdout.flush()
            return
        if as_json:
            print_json(client.logs(job_id, step))
            return
        for text in client.print_logs(job_id, step):
            sys.stdout.write(text)


def download(
    job_id: options.JobId,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artifacts go.")],
    verify_key: Annotated[
        Path | None,
        typer.Option("--verify-key", metavar="FILE", help="Public key (PEM) that every artifact must be signed with."),
    ] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Download a job's artifacts.

    With their manifests, checked against their digests; a broken download is resumed. With a key, what is not signed
    with it is refused.
    """
    with options.connect(url, api_key) as client:
        paths = client.download(job_id, output, verify_key=verify_key)
    if as_json:
        print_json([str(path) for path in paths])
        return
    for path in paths:
        print(path)
    if not paths:
        say(f"Job {job_id} has published nothing (yet).")


def watch_job(client: Client, job_id: str, seen: int = 0) -> dict[str, Any]:
    """Show a job's progress until it has ended and return it; `seen`: the number of the last event that is not news."""
    try:
        with ProgressView(lambda: client.get(job_id)) as view:
            return client.wait(job_id, view.on_event, after=seen)
    except KeyboardInterrupt:
        say(f"Job {job_id} goes on: `edgekiln job {job_id} --watch` shows it, `edgekiln cancel {job_id}` ends it.")
        raise


def finish_command(document: dict[str, Any], as_json: bool) -> NoReturn:
    """Print an ended job and end the command."""
    if as_json:
        print_json(document)
        say_outcome(document)
    else:
        print_outcome(document)
    raise typer.Exit(exit_code(document))
