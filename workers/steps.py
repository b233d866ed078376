"""What a step function is.

Owns the signature that every unit of work shares and nothing else. A step function is pure with respect to
the service: it reads folders, writes a folder and returns figures, and knows neither the ledger nor the
store nor Celery. `workers.runner` prepares the folders; `workers.sandbox` runs the function in a child; a
person runs it by hand through `run_by_hand` (`python -m workers.convert.quantize ...`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from service.errors import EdgeKilnError


class Progress(Protocol):
    """Reports where a step is; cheap, may be called often."""

    def __call__(self, message: str, fraction: float | None = None) -> None:
        """Say what is being done; `fraction` in [0, 1] when it is known."""


class StepFunction(Protocol):
    """The one shape of work."""

    def __call__(
        self,
        params: Mapping[str, Any],
        inputs: Mapping[str, Path],
        output_dir: Path,
        progress: Progress,
    ) -> dict[str, Any]:
        """Do the work and return its figures (JSON values, units in the names).

        `inputs` maps an input's name (`checkpoint`, `convert`, `quantize`, ...) to a folder that must not be
        written. Every file left in `output_dir` is an output under its relative path. Equal `params` and
        inputs give equal output bytes. Raises `EdgeKilnError` for everything a user can cause.
        """


def print_progress(message: str, fraction: float | None = None) -> None:
    """Write progress to standard error, for steps run by hand."""
    share = "" if fraction is None else f"{fraction:4.0%} "
    print(f"{share}{message}", file=sys.stderr, flush=True)


def run_by_hand(function: StepFunction, description: str, argv: list[str] | None = None) -> int:
    """Run one step function from a shell and print its figures as JSON; the exit code is 0 or 1."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--params", default="{}", help='JSON object, e.g. \'{"recipe": "dynamic_int8"}\'')
    parser.add_argument("--input", action="append", default=[], metavar="NAME=DIR", help="an input folder; repeatable")
    parser.add_argument("-o", "--output-dir", required=True, type=Path, help="folder for the outputs")
    arguments = parser.parse_args(argv)
    inputs: dict[str, Path] = {}
    for item in arguments.input:
        name, _, folder = item.partition("=")
        inputs[name] = Path(folder)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        figures = function(json.loads(arguments.params), inputs, arguments.output_dir, print_progress)
    except EdgeKilnError as error:
        print(json.dumps(error.to_json(), indent=2), file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2, sort_keys=True))
    return 0
