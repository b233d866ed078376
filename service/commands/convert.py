"""`edgekiln convert`: one job from checkpoint to files, with everything it needs started and stopped around it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
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
  edgekiln convert ./my-model -o out --recipe-file mine.json --calibration-prompts prompts.txt
  edgekiln convert ./my-model -o out --gate min_exact_match=0.95 --json > job.json
"""


@options.takes_order
def convert(
    order: options.Order,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the artifacts go.")],
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Convert a checkpoint; no server is needed.

    Starts the embedded profile, runs one job, puts each proven artifact with its manifest into a folder, and stops
    everything. Exits with 0 only if every variant succeeded, 1 otherwise, 2 if what was asked for cannot work.
    """
    settings = options.read_settings(data_dir=data_dir, port=0, host="127.0.0.1")
    _make_folder(output)
    with orderly_end() as end_if_asked:
        job = run_job(settings, order, output, end_if_asked)
    if as_json:
        print_json(job)
        say_outcome(job)
    else:
        print_outcome(job)
        _hint(job, data_dir)
    raise typer.Exit(exit_code(job))


def _hint(job: dict[str, Any], data_dir: Path | None) -> None:
    """Say how to choose, where there is a choice."""
    if sum(bool(variant["artifacts"]) for variant in job["variants"]) > 1:
        where = "" if data_dir is None else f" --data-dir {shlex.quote(str(data_dir))}"
        say(f"To choose among them: edgekiln compare {job['id']}{where}")


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{output} cannot be made: {error.strerror}. Name another folder with -o.") from error


def run_job(settings: Settings, order: options.Order, output: Path, end_if_asked: Callable[[], None]) -> dict[str, Any]:
    """Run one job and download its artifacts; return the job with local paths in its artifacts.

    An interrupted command cancels its job; `end_if_asked` is that of `orderly_end`. A server that holds the data
    directory is used; when it ends before the job does, this command serves the rest itself.
    """
    job_id: str | None = None
    seen = 0
    while True:
        with _server(settings, order.request) as (client, is_guest):
            try:
                if job_id is None:
                    end_if_asked()
                    job_id = _submit(client, settings, order, is_guest)
                    say(f"Job {job_id}.")
                seen = _follow(client, job_id, seen, end_if_asked)
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


def _submit(client: Client, settings: Settings, order: options.Order, is_guest: bool) -> str:
    from service.requests import FolderSource

    order.upload_files(client)
    if is_guest and isinstance(order.request.source, FolderSource):
        return _submit_directly(settings, order.request)
    return str(client.submit(order.request)["id"])


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


def _follow(client: Client, job_id: str, seen: int, end_if_asked: Callable[[], None]) -> int:
    """Show a job's events until it ends; return the number of the last one."""
    with ProgressView(lambda: client.get(job_id)) as view:
        for event in client.events(job_id, seen):
            end_if_asked()
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
