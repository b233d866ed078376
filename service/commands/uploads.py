"""`edgekiln upload`: brings files to a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from service.commands import options
from service.commands.output import print_json
from service.units import format_bytes

UPLOAD_EPILOG = """Examples:

\b
  edgekiln upload prompts.txt
  edgekiln upload model.safetensors config.json --json
"""


def upload(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What to upload.", exists=True, dir_okay=False)
    ],
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Upload files and print the SHA-256 of each, by which jobs name it.

    Large ones go in pieces: after a broken connection, or when the command is repeated, an upload goes on where it was.
    """
    with options.connect(url, api_key) as client:
        uploads = [client.upload(file, on_bytes=show_bytes if sys.stderr.isatty() else None) for file in files]
    if as_json:
        print_json(uploads)
        return
    for document, file in zip(uploads, files, strict=True):
        print(document["sha256"], file)


def show_bytes(name: str, done_bytes: int, size_bytes: int) -> None:
    """Say on a terminal how much of a file has been sent, over what was said before."""
    end = "\n" if done_bytes == size_bytes else ""
    print(
        f"\r{name}: {format_bytes(done_bytes)} of {format_bytes(size_bytes)}   ", end=end, file=sys.stderr, flush=True
    )
