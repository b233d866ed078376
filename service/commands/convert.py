"""`edgekiln convert`: one job from checkpoint to files, with everything it needs started and stopped around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands import options
from service.commands.interrupts import orderly_end
from service.commands.output import print_json, say
from service.commands.progress import ProgressView
from service.commands.report import exit_code, print_outcome, say_outcome
from service.errors import DataDirBusy, EdgeKilnError, InvalidRequest, ServiceUnavailable

if TYPE_CHECKING:
    from service.client import Client
    from service.requests import JobRequest
    from service.settings import Settings

#: How long a server that belongs to somebody else may be silent before this command serves itself.
_GUEST_PATIENCE_S = 5.0

EPILOG = """Examples:

\b
  edgekiln convert ./my-model -o out
  edgekiln convert ./my-model -o out --recipe none --recipe dynamic_int8 --format tflite --format litertlm
  edgekiln convert HuggingFaceTB/SmolLM-135M -o out --context 1024 --benchmark host
  edgekiln convert ./my-model -o out --gate min_exact_match=0.95 --json > job.json
"""


def convert(
    source: options.Source,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artifacts go.")],
    recipe: options.Recipes = None,
    format: options.Formats = None,
    engine: options.Engines = None,
    prefill: options.Prefill = None,
    context: options.Context = None,
    benchmark: options.Benchmark = None,
    gate: options.Gates = None,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Convert a checkpoint; no server is needed.

    Starts the embedded profile, runs one job, puts each proven artifact with its manifest into a folder, and stops
    everything. Exits with 0 only if every variant succeeded, 1 otherwise, 2 if what was asked for cannot work.
    """
    request = options.make_request(
        source,
        recipes=recipe,
        formats=format,
        engines=engine,
        prefill=prefill,
        context=context,
        benchmark=benchmark,
        gates=gate,
    )
    settings = options.read_settings(data_dir=data_dir, port=0, host="127.0.0.1")
    _make_folder(output)
    with orderly_end():
        job = run_job(settings, request, output)
    if as_json:
        print_json(job)
        say_outcome(job)
    else:
        print_outcome(job)
    raise typer.Exit(exit_code(job))


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{output} cannot be made: {error.strerror}. Name another folder with -o.") from error


def run_job(settings: Settings, request: JobRequest, output: Path) -> dict[str, Any]:
    """Run one job and download its artifacts; return the job with local paths in its artifacts.

    An interrupted command cancels its job. A server that holds the data directory is used; when it ends before the
    job does, this command serves the rest itself.
    """
    job_id: str | None = None
    seen = 0
    while True:
        with _server(settings, request) as (client, is_guest):
            try:
                if job_id is None:
                    job_id = _submit(client, settings, request, is_guest)
                    say(f"Job {job_id}.")
                seen = _follow(client, job_id, seen)
                return _collect(client, job_id, output)
            except ServiceUnavailable:
                if not is_guest or job_id is None:
                    raise
                say("The server that ran the job has ended; going on without it.")
            except (KeyboardInterrupt, SystemExit):
                if job_id is not None:
                    say("Interrupted: the job is cancelled. What was finished is reused next time.")
                    with suppress(EdgeKilnError):
                        client.cancel(job_id)
                raise


@contextmanager
def _server(settings: Settings, request: JobRequest) -> Iterator[tuple[Client, bool]]:
    """Yield a client, and whether its server is somebody else's."""
    from service.client import Client
    from service.requests import FolderSource
    from service.supervisor import Supervisor

    source = request.source
    roots = (Path(source.path),) if isinstance(source, FolderSource) else ()
    supervisor = Supervisor(settings.model_copy(update={"source_roots": roots}), report=say)
    try:
        supervisor.start()
    except DataDirBusy as busy:
        url = busy.details.get("url")
        if url is None:
            raise
        say(f"{settings.data_dir} is served at {url}; using that server.")
        with Client(url, patience_s=_GUEST_PATIENCE_S) as client:
            yield client, True
        return
    try:
        with Client(supervisor.url) as client:
            yield client, False
    finally:
        supervisor.stop()


def _submit(client: Client, settings: Settings, request: JobRequest, is_guest: bool) -> str:
    from service.requests import FolderSource

    if is_guest and isinstance(request.source, FolderSource):
        return _submit_directly(settings, request)
    return str(client.submit(request)["id"])


def _submit_directly(settings: Settings, request: JobRequest) -> str:
    """Enter the job into the ledger.

    The roots of a running server limit what the network may name; whoever owns the data directory reads their own
    folders.
    """
    from service.ledger import access, jobs
    from service.ledger.database import Database
    from service.queue import Poker, make_app

    database = Database(settings.ledger_url, Poker(make_app(settings)))
    try:
        submission = jobs.submit_job(database, access.DEFAULT_TENANT, request, max_variants=settings.max_variants)
    finally:
        database.close()
    return submission.job_id


def _follow(client: Client, job_id: str, seen: int) -> int:
    """Show a job's events until it ends; return the number of the last one."""
    with ProgressView(lambda: client.get(job_id)) as view:
        for event in client.events(job_id, seen):
            view.on_event(event)
            seen = event["number"]
    return seen


def _collect(client: Client, job_id: str, output: Path) -> dict[str, Any]:
    """Download what was published and enter the paths into the job."""
    job = client.get(job_id)
    for variant in job["variants"]:
        for artifact in variant["artifacts"]:
            (path,) = client.download(artifact, output)
            artifact["path"] = str(path)
            artifact["manifest_path"] = f"{path}.manifest.json"
    return job
