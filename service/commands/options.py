"""Options that several commands share, and the order that they make."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.devices import ANY_OR_ALL, BACKENDS, HOST
from service.errors import InvalidRequest
from service.recipes import ENGINES, FORMATS, RECIPES, require_known
from service.strict_json import JsonInvalid, parse_json

if TYPE_CHECKING:
    from service.client import Client
    from service.requests import JobRequest
    from service.settings import Settings

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A checkpoint folder, OWNER/NAME[@REVISION] on the Hub, or a folder at https:// or s3://.",
    ),
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
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        "--benchmark",
        metavar="DEVICE",
        help="Measure there: host, any, all, or conditions on a phone, e.g. 'ram_gib>=8,android>=14'; may be repeated.",
    ),
]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", metavar="B", help="What phones compute on: cpu, gpu, npu; may be repeated."),
]
Threads = Annotated[
    list[int] | None,
    typer.Option("--threads", metavar="N", help="CPU threads on phones; may be repeated. [default: fast cores]"),
]
SmokePrompts = Annotated[
    int | None,
    typer.Option(
        "--smoke-prompts", metavar="N", help="Fixed prompts that bundles answer on phones, 0 to 4. [default: 3]"
    ),
]
Profile = Annotated[
    bool, typer.Option("--profile", help="On phones, tell in a run apart what each node of a .tflite takes.")
]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", metavar="FILE", help="Text that recipes with quantized activations measure on."),
]
CalibrationPrompts = Annotated[
    str | None,
    typer.Option("--calibration-prompts", metavar="FILE", help="The same, one prompt a line, in the chat template."),
]
Evaluation = Annotated[
    str | None,
    typer.Option("--evaluation", metavar="FILE", help="Prompts and answers as JSON lines, for exact match."),
]
PerplexityText = Annotated[
    str | None, typer.Option("--perplexity-text", metavar="FILE", help="Text that perplexity is measured on.")
]
RecipeFiles = Annotated[
    list[str] | None,
    typer.Option("--recipe-file", metavar="[NAME=]FILE", help="A recipe of your own, as JSON; may be repeated."),
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate", metavar="NAME=VALUE", help="Publish only what keeps this threshold, e.g. min_exact_match=0.9."
    ),
]
IgnoreCustomCode = Annotated[
    bool,
    typer.Option(
        "--ignore-custom-code", help="Use the built-in class where the checkpoint names code of its own (auto_map)."
    ),
]
Priority = Annotated[
    int | None, typer.Option("--priority", metavar="N", help="-100 to 100; your own higher ones run first.")
]
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


#: Names an upload in place of a file, as the commands in manifests do.
_UPLOADED = "sha256:"


@dataclass(frozen=True)
class Order:
    """A request, and the files that must be uploaded before it is submitted."""

    request: JobRequest
    #: By digest.
    files: Mapping[str, Path]

    def upload_files(self, client: Client) -> None:
        """Bring the files to the server; those it has already cost it nothing."""
        for file in self.files.values():
            client.upload(file)

    def with_folder_uploaded(self) -> Order:
        """Return the order with the files of its source folder among those to upload; another source stays."""
        from service.local_folder import read_folder
        from service.requests import FolderSource

        if not isinstance(self.request.source, FolderSource):
            return self
        source, files = read_folder(Path(self.request.source.path))
        return Order(self.request.model_copy(update={"source": source}), {**self.files, **files})


def make_order(
    source: Source,
    recipe: Recipes = None,
    format: Formats = None,
    engine: Engines = None,
    prefill: Prefill = None,
    context: Context = None,
    device: Devices = None,
    backend: Backends = None,
    threads: Threads = None,
    smoke_prompts: SmokePrompts = None,
    profile: Profile = False,
    calibration: Calibration = None,
    calibration_prompts: CalibrationPrompts = None,
    evaluation: Evaluation = None,
    perplexity_text: PerplexityText = None,
    recipe_file: RecipeFiles = None,
    gate: Gates = None,
    ignore_custom_code: IgnoreCustomCode = False,
    priority: Priority = None,
) -> Order:
    """Check everything that can be checked before anything starts, and return the order.

    Its parameters are the options of every command that `takes_order`. Raises `UnknownName` with the nearest name,
    `InvalidRequest` and `SourceNotFound`.
    """
    own_recipes = dict(_read_recipe(text) for text in recipe_file or ())
    # Names first: they cost nothing, and the folder's trouble would hide theirs.
    for kind, names, known in (
        ("recipe", recipe, (*RECIPES, *own_recipes)),
        ("format", format, FORMATS),
        ("engine", engine, ENGINES),
    ):
        for name in names or ():
            require_known(kind, name, known)
    require_known_devices(device or (), backend or ())

    from service.requests import parse_request, parse_source

    files: dict[str, Path] = {}
    fields: dict[str, Any] = {
        # Who brings a recipe wants it, named or not.
        "recipes": list(dict.fromkeys([*(recipe or ()), *own_recipes])),
        "formats": format,
        "engines": engine,
        "prefill_lengths": prefill,
        "context_length": context,
        "devices": device,
        "backends": backend,
        "threads": threads,
        "smoke_prompts": smoke_prompts,
        "profile": profile,
        "calibration": _choose_calibration(calibration, calibration_prompts, files),
        "evaluation": _name_upload("--evaluation", evaluation, files),
        "perplexity_text": _name_upload("--perplexity-text", perplexity_text, files),
        "own_recipes": own_recipes,
        "gates": parse_gates(gate or []),
        "ignore_custom_code": ignore_custom_code,
        "priority": priority,
    }
    # An empty list or table was not asked for; a zero was.
    given = {name: value for name, value in fields.items() if value not in (None, [], {})}
    request = parse_request({"source": parse_source(source).model_dump(mode="json"), **given})
    return Order(request, files)


def require_known_devices(devices: Iterable[str], backends: Iterable[str]) -> None:
    """Raise `UnknownName` with the nearest name for a word that selects no device, or names no backend."""
    for backend in backends:
        require_known("backend", backend, BACKENDS)
    for text in devices:
        name = text.split(",")[0].strip()
        if not set(name) & set("<>=!"):
            require_known("device", name, (HOST, *ANY_OR_ALL))


def takes_order(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `make_order` in place of its first parameter, `order`."""
    order_options = inspect.signature(make_order, eval_str=True).parameters
    (_, *own_options) = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**values: Any) -> None:
        order = make_order(**{name: values.pop(name) for name in order_options})
        command(order, **values)

    options = [*order_options.values(), *own_options]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]
    )
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _choose_calibration(text: str | None, prompts: str | None, files: dict[str, Path]) -> dict[str, str] | None:
    if text and prompts:
        raise InvalidRequest("Give either --calibration or --calibration-prompts: a recipe measures on one of them.")
    for kind, option, place in (("text", "--calibration", text), ("prompts", "--calibration-prompts", prompts)):
        upload = _name_upload(option, place, files)
        if upload is not None:
            return {"kind": kind, "upload": upload}
    return None


def _name_upload(option: str, place: str | None, files: dict[str, Path]) -> str | None:
    """Return the digest of a file that is to be uploaded, and enter it into `files`; `sha256:DIGEST` names itself."""
    if place is None:
        return None
    if place.startswith(_UPLOADED):
        return place.removeprefix(_UPLOADED)
    file = Path(place).expanduser()
    digest = hashlib.sha256(_read_text(option, file).encode()).hexdigest()
    files[digest] = file
    return digest


def _read_text(option: str, file: Path) -> str:
    """Return a file's text as it is; raises `InvalidRequest` for one that is empty or not UTF-8."""
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise InvalidRequest(f"{option} {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{option} {file}: not UTF-8 text, at byte {error.start}.") from error
    if not text.strip():
        raise InvalidRequest(f"{option} {file}: the file is empty.")
    return text


def _read_recipe(place: str) -> tuple[str, Any]:
    """Read `[NAME=]FILE.json`, or `NAME=[...]` as manifests give it; the name is the file's by default."""
    name, separator, rest = place.partition("=")
    if not separator:
        name, rest = Path(place).stem, place
    is_inline = rest.lstrip().startswith("[")
    text = rest if is_inline else _read_text("--recipe-file", Path(rest).expanduser())
    try:
        return name, parse_json(text)
    except JsonInvalid as error:
        raise InvalidRequest(f"--recipe-file {name if is_inline else place} {error}.") from None


def parse_gates(texts: list[str]) -> dict[str, float]:
    """Read `NAME=VALUE`s; raises `InvalidRequest`."""
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
