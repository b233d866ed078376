"""Options that several commands share, and the job request that they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.errors import InvalidRequest
from service.recipes import DEVICES, ENGINES, FORMATS, RECIPES, require_known

if TYPE_CHECKING:
    from service.client import Client
    from service.requests import JobRequest
    from service.settings import Settings

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A checkpoint folder, or OWNER/NAME[@REVISION] on the Hub.")
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's id, as `edgekiln jobs` lists it.")]
Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", "-r", metavar="R", help=f"May be repeated: {', '.join(RECIPES)}. [default: dynamic_int8]"),
]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", "-f", metavar="F", help=f"May be repeated: {', '.join(FORMATS)}. [default: litertlm]"),
]
Engines = Annotated[
    list[str] | None,
    typer.Option("--engine", metavar="E", help=f"May be repeated: {', '.join(ENGINES)}. [default: auto]"),
]
Prefill = Annotated[
    list[int] | None,
    typer.Option("--prefill", metavar="N", help="A prefill signature of N tokens; may be repeated."),
]
Context = Annotated[int | None, typer.Option("--context", metavar="N", help="KV cache length in tokens.")]
Benchmark = Annotated[
    list[str] | None,
    typer.Option("--benchmark", metavar="DEVICE", help=f"Measure there: {', '.join(DEVICES)}."),
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate", metavar="NAME=VALUE", help="Publish only what keeps this threshold, e.g. min_exact_match=0.9."
    ),
]
Priority = Annotated[int | None, typer.Option("--priority", metavar="N", help="Higher runs first, -100 to 100.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Where ledger, store and logs are kept. [env: EDGEKILN_DATA_DIR]"),
]
Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The server. [env: EDGEKILN_URL; default: http://127.0.0.1:8711]"),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", metavar="KEY", help="The server's API key. [env: EDGEKILN_API_KEY]")
]


def make_request(
    source: str,
    *,
    recipes: list[str] | None,
    formats: list[str] | None,
    engines: list[str] | None,
    prefill: list[int] | None,
    context: int | None,
    benchmark: list[str] | None,
    gates: list[str] | None,
    priority: int | None = None,
) -> JobRequest:
    """Check everything that can be checked before anything starts, and return the request.

    Raises `UnknownName` with the nearest name, `InvalidRequest` and `SourceNotFound`.
    """
    # Names first: they cost nothing, and the folder's trouble would hide theirs.
    for kind, names, known in (
        ("recipe", recipes, tuple(RECIPES)),
        ("format", formats, FORMATS),
        ("engine", engines, ENGINES),
        ("device", benchmark, DEVICES),
    ):
        for name in names or ():
            require_known(kind, name, known)

    from service.requests import parse_request, parse_source

    fields: dict[str, Any] = {
        "recipes": recipes,
        "formats": formats,
        "engines": engines,
        "prefill_lengths": prefill,
        "context_length": context,
        "devices": benchmark,
        "gates": _parse_gates(gates or []),
        "priority": priority,
    }
    # An empty list or table was not asked for; a zero was.
    given = {name: value for name, value in fields.items() if value not in (None, [], {})}
    return parse_request({"source": parse_source(source).model_dump(mode="json"), **given})


def _parse_gates(texts: list[str]) -> dict[str, float]:
    gates = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            gates[name] = float(value)
        except ValueError:
            raise InvalidRequest(f"--gate {text!r} must read NAME=VALUE, e.g. min_exact_match=0.9.") from None
    return gates


def read_settings(**overrides: Any) -> Settings:
    """Return the settings in force, flags first."""
    from service.settings import load_settings

    return load_settings(overrides)


def connect(url: str | None, api_key: str | None) -> Client:
    """Return a client of the server that the flags or the environment name."""
    from service.client import Client

    return Client(url, api_key)
