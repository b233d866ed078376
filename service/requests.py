"""What a job asks for: the `JobRequest` and its canonical form. Pure, apart from looking whether a folder exists.

Called by `service.api` (REST bodies), `service.cli` (arguments) and `service.ledger` (stored requests).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from service import gates
from service.checkpoint_files import MAX_NEEDED_FILES, NEEDED_NAMES, is_needed
from service.devices import HOST, parse_selector
from service.errors import InvalidRequest, SourceNotFound
from service.recipes import (
    ENGINES,
    FORMATS,
    find_recipe,
    parse_own_recipe,
    require_known,
    require_runnable,
)
from service.strict_json import JsonInvalid, parse_json
from service.web_addresses import normalise_folder_url

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}")
_CONFIG = ConfigDict(frozen=True, extra="forbid")
#: Text without control characters: databases refuse some of them, and terminals obey others.
PLAIN = r"^[^\x00-\x1f\x7f-\x9f]*$"
_UNSTORABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
#: Kinds of sources.
_KINDS = ("folder", "hub", "https", "s3", "upload")


class FolderSource(BaseModel):
    """A checkpoint in a folder that the workers can read."""

    model_config = _CONFIG
    kind: Literal["folder"] = "folder"
    path: str = Field(min_length=1, max_length=4096, pattern=PLAIN, description="Absolute path of the folder.")

    @field_validator("path")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if not Path(value).is_absolute() or "\0" in value:
            raise ValueError(f"a folder source needs an absolute path, not {value!r}")
        return value

    @property
    def label(self) -> str:
        """A short name for artifacts."""
        return Path(self.path).name or "model"


class HubSource(BaseModel):
    """A model repository of the Hugging Face Hub."""

    model_config = _CONFIG
    kind: Literal["hub"] = "hub"
    repo: str = Field(description="Repository, e.g. `HuggingFaceTB/SmolLM-135M`.")
    revision: str | None = Field(default=None, description="Branch, tag or commit; the default branch if absent.")

    @field_validator("repo")
    @classmethod
    def _repo_name(cls, value: str) -> str:
        if not _HUB_NAME.fullmatch(value) or "--" in value or ".." in value:
            raise ValueError(f"{value!r} is not a Hub repository: write OWNER/NAME")
        return value

    @field_validator("revision")
    @classmethod
    def _revision_name(cls, value: str | None) -> str | None:
        if value is not None and (not _HUB_REVISION.fullmatch(value) or ".." in value):
            raise ValueError(f"{value!r} is not a branch, tag or commit")
        return value

    @property
    def label(self) -> str:
        """A short name for artifacts."""
        return self.repo.rsplit("/", 1)[-1]


class HttpsSource(BaseModel):
    """A checkpoint in a folder of a web server."""

    model_config = _CONFIG
    kind: Literal["https"] = "https"
    url: str = Field(description="The folder, e.g. `https://models.example.org/mine/`; without a query.")
    files: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_NEEDED_FILES,
        description="Names of the files to take; without them, those are found that a checkpoint's files can have.",
    )

    @field_validator("url")
    @classmethod
    def _folder_url(cls, value: str) -> str:
        url = normalise_folder_url(value)
        last = url.rstrip("/").rpartition("/")[2]
        if is_needed(last):
            raise ValueError(f"name the folder that holds {last}, not the file")
        return url

    @field_validator("files")
    @classmethod
    def _names(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else _require_needed(value)

    @property
    def label(self) -> str:
        """A short name for artifacts."""
        _, _, rest = self.url.partition("://")
        host, *folders = [part for part in rest.split("/") if part]
        return _make_label(unquote(folders[-1])) if folders else _make_label(host)


class S3Source(BaseModel):
    """A checkpoint in a bucket, on the S3 server that the operator has set for sources."""

    model_config = _CONFIG
    kind: Literal["s3"] = "s3"
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", description="The bucket's name.")
    prefix: str = Field(default="", max_length=900, description="What stands before the files' names, without the `/`.")

    @field_validator("prefix")
    @classmethod
    def _folder_prefix(cls, value: str) -> str:
        prefix = value.removesuffix("/")
        parts = prefix.split("/")
        if prefix and not (prefix.isprintable() and all(part not in ("", ".", "..") for part in parts)):
            raise ValueError(f"{value[:100]!r} is no prefix: write names joined by single slashes")
        if is_needed(parts[-1]):
            raise ValueError(f"name the prefix that holds {parts[-1]}, not the file")
        return prefix

    @property
    def label(self) -> str:
        """A short name for artifacts."""
        return _make_label(self.prefix.rpartition("/")[2] or self.bucket)


#: SHA-256 of an upload of the same tenant.
UploadDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", examples=["9f86d081" * 8])]


class UploadSource(BaseModel):
    """A checkpoint made of files that were uploaded before."""

    model_config = _CONFIG
    kind: Literal["upload"] = "upload"
    files: dict[str, UploadDigest] = Field(
        min_length=1, max_length=MAX_NEEDED_FILES, description="Name in the checkpoint -> SHA-256 of the upload."
    )
    name: str | None = Field(
        default=None, min_length=1, max_length=100, pattern=PLAIN, description="What artifacts are called by."
    )

    @field_validator("files")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: value[name] for name in _require_needed(value)}

    @property
    def label(self) -> str:
        """A short name for artifacts."""
        return _make_label(self.name or "model")


def _require_needed(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names, sorted, each once; raises `ValueError` for one that no file of a checkpoint has."""
    for name in names:
        if not is_needed(name):
            raise ValueError(
                f"{name[:100]!r} is no file of a checkpoint; those are {', '.join(sorted(NEEDED_NAMES))}, and shards "
                "such as model-00001-of-00002.safetensors"
            )
    return tuple(sorted(set(names)))


def _refuse_unstorable(value: Any) -> None:
    if any(_UNSTORABLE.search(text) for text in _find_texts(value)):
        raise ValueError("a text holds control characters, or half of a surrogate pair; leave them out")


def _find_texts(value: Any) -> Iterator[str]:
    """Yield every text in a JSON document, names among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _find_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _find_texts(item)


def _make_label(text: str) -> str:
    """Return a text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:100] or "model"


AnySource = FolderSource | HubSource | HttpsSource | S3Source | UploadSource
Source = Annotated[AnySource, Field(discriminator="kind")]


class Calibration(BaseModel):
    """What activations are measured on, for recipes that quantize them ahead of time."""

    model_config = _CONFIG
    kind: Literal["text", "prompts"] = Field(
        description='`text`: plain text. `prompts`: one prompt a line as JSON, `{"prompt": "..."}`, rendered '
        "by the model's own chat template."
    )
    upload: UploadDigest


def _require_devices(value: tuple[str, ...]) -> tuple[str, ...]:
    _refuse_unstorable(value)
    for text in value:
        if text != HOST:
            parse_selector(text)
    return tuple(dict.fromkeys(value))


def _once(value: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(value))


Devices = Annotated[
    tuple[str, ...],
    AfterValidator(_require_devices),
    Field(
        max_length=32, description="Where to benchmark: `host`, `any`, `all`, or conditions on a phone (`soc=SM8650`)."
    ),
]
Backends = Annotated[
    tuple[Literal["cpu", "gpu", "npu"], ...],
    AfterValidator(_once),
    Field(min_length=1, description="What phones compute on, each in turn."),
]
Threads = Annotated[
    tuple[Annotated[int, Field(ge=1, le=64)], ...],
    AfterValidator(_once),
    Field(max_length=8, description="CPU threads on phones, each in turn; the phone's fast cores when empty."),
]
SmokePrompts = Annotated[
    int,
    Field(
        ge=0, le=4, description="Fixed prompts that a bundle answers on a phone, compared with its answers on the host."
    ),
]
Profile = Annotated[bool, Field(description="On phones, a run apart that tells what each node of a graph takes.")]
Priority = Annotated[int, Field(ge=-100, le=100, description="Of your own jobs, the higher runs first.")]


class BenchmarkRequest(BaseModel):
    """Where and how a published artifact is to be measured."""

    model_config = _CONFIG
    devices: Annotated[Devices, Field(min_length=1)]
    backends: Backends = ("cpu",)
    threads: Threads = ()
    smoke_prompts: SmokePrompts = 3
    profile: Profile = False
    priority: Priority = 0


class JobRequest(BaseModel):
    """One conversion request: a source, a matrix of variants, gates, devices."""

    model_config = _CONFIG
    source: Source
    engines: tuple[str, ...] = Field(default=("auto",), min_length=1)
    recipes: Annotated[tuple[str, ...], AfterValidator(_once)] = Field(default=("dynamic_int8",), min_length=1)
    formats: tuple[str, ...] = Field(default=("litertlm",), min_length=1)
    prefill_lengths: tuple[int, ...] | None = Field(
        default=None, description="Prefill signatures in tokens; chosen from the context when absent."
    )
    context_length: int | None = Field(default=None, ge=2, le=1_048_576, description="KV cache length in tokens.")
    devices: Devices = ()
    backends: Backends = ("cpu",)
    threads: Threads = ()
    smoke_prompts: SmokePrompts = 3
    profile: Profile = False
    calibration: Calibration | None = Field(default=None, description="A small text of ours when absent.")
    evaluation: UploadDigest | None = Field(
        default=None, description='JSON lines `{"prompt", "answer"}` in place of the checkpoint\'s `evaluation.jsonl`.'
    )
    perplexity_text: UploadDigest | None = Field(
        default=None, description="UTF-8 text for perplexity; a small text of ours when absent."
    )
    own_recipes: dict[str, list[dict[str, Any]]] = Field(
        default_factory=dict, description="Recipes of ai-edge-quantizer entries, by the names that `recipes` uses."
    )
    gates: dict[str, FiniteFloat] = Field(
        default_factory=dict, description="Thresholds beyond the default gates, or of those that may be set."
    )
    ignore_custom_code: bool = Field(
        default=False, description="Convert with the built-in class although the checkpoint names code of its own."
    )
    priority: Priority = 0

    @field_validator("engines", "formats")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: Any) -> tuple[str, ...]:
        known = {"engines": ENGINES, "formats": FORMATS}[info.field_name]
        for name in value:
            require_known(info.field_name[:-1], name, known)
        return tuple(dict.fromkeys(value))

    @field_validator("own_recipes")
    @classmethod
    def _own_recipes(cls, value: dict[str, Any]) -> dict[str, Any]:
        _refuse_unstorable(value)
        return {name: parse_own_recipe(name, entries) for name, entries in value.items()}

    @field_validator("prefill_lengths")
    @classmethod
    def _lengths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        if not value or len(value) > 8 or any(length < 1 for length in value):
            raise ValueError("give one to eight prefill lengths of at least 1 token")
        return tuple(sorted(set(value)))

    @field_validator("gates")
    @classmethod
    def _gates(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            gates.require_nameable(name)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> JobRequest:
        for recipe in self.recipes:
            require_runnable(find_recipe(recipe, self.own_recipes), self.engines, self.formats)
        unused = [name for name in self.own_recipes if name not in self.recipes]
        if unused:
            raise ValueError(f"own_recipes holds {', '.join(unused)}, which recipes does not name")
        if self.context_length is not None:
            for length in self.prefill_lengths or ():
                if length > self.context_length:
                    raise ValueError(
                        f"prefill length {length} is larger than the context of {self.context_length} tokens"
                    )
            largest = max(self.prefill_lengths or (1,))
            if self.context_length % largest:
                raise ValueError(
                    f"a context of {self.context_length} tokens is no multiple of the largest prefill length, {largest}"
                )
        if self.profile and ("tflite" not in self.formats or all(device == HOST for device in self.devices)):
            raise ValueError(
                "a profile is of a graph on a phone: ask for the format tflite, and a device other than host"
            )
        if gates.needs_benchmark(self.gates) and not self.devices:
            raise ValueError("a gate on a benchmark's figure needs a device to measure it on")
        return self

    @property
    def uploads(self) -> dict[str, str]:
        """What the uploads are for -> their digests; the names that steps see them by."""
        digests = {
            "calibration": self.calibration.upload if self.calibration else None,
            "evaluation": self.evaluation,
            "perplexity_text": self.perplexity_text,
        }
        return {name: digest for name, digest in digests.items() if digest is not None}

    @property
    def held_uploads(self) -> frozenset[str]:
        """Digests of all uploads that the job needs: those above, and a checkpoint's own files."""
        files = self.source.files.values() if isinstance(self.source, UploadSource) else ()
        return frozenset([*self.uploads.values(), *files])

    @property
    def variant_names(self) -> dict[str, tuple[str, str]]:
        """Variant name -> (engine, recipe), in order; the engine is named only when the job has several."""
        several = len(self.engines) > 1
        return {
            f"{engine}-{recipe}" if several else recipe: (engine, recipe)
            for engine in self.engines
            for recipe in self.recipes
        }

    def to_json(self) -> dict[str, Any]:
        """Return the canonical document."""
        return self.model_dump(mode="json")

    def to_asked(self) -> dict[str, Any]:
        """Return what was asked for beyond the defaults: the same in every version that knows it."""
        return self.model_dump(mode="json", exclude_defaults=True)


class MeasuringRequest(JobRequest):
    """What a job holds that measures a published artifact: the request that made it, as far as it is about that one.

    Only the ledger makes one, of a `BenchmarkRequest`.
    """

    #: The artifact's id.
    artifact: str
    #: Fresh processes a measurement, as the operator's protocol was when it was asked for.
    processes: int


def parse_request(document: Any) -> JobRequest:
    """Check a JSON document whole and return the request; raises `InvalidRequest` naming every bad field."""
    try:
        return JobRequest.model_validate(document)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


def parse_stored_request(document: Mapping[str, Any]) -> JobRequest:
    """Return the request that a job or a schedule holds; raises `InvalidRequest` where this version knows it no more.

    Fields that only a newer version knows are passed over: while a fleet is upgraded, its jobs go through old hands.
    """
    model = MeasuringRequest if "artifact" in document else JobRequest
    try:
        return model.model_validate(document)
    except ValidationError as error:
        newer = [item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"]
    try:
        return model.model_validate(_leave_out(document, newer))
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


def _leave_out(document: Mapping[str, Any], places: Iterable[Sequence[int | str]]) -> Any:
    """Return a copy of a document without the fields at these places, as a validator names them."""
    copied = copy.deepcopy(document)
    for *path, name in places:
        owner: Any = copied
        for part in path:
            # A union's kind stands in the path, and not in the document.
            owner = owner[part] if isinstance(part, int) or part in owner else owner
        owner.pop(name, None)
    return copied


def parse_measuring_request(document: Mapping[str, Any]) -> MeasuringRequest:
    """Return the request of a job that measures an artifact; raises `InvalidRequest`."""
    try:
        return MeasuringRequest.model_validate(document)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error


def invalid_request(errors: list[Any]) -> InvalidRequest:
    """Turn a validator's findings into one sentence per field."""
    problems = [
        {"field": _name_field(item["loc"]), "message": item["msg"].removeprefix("Value error, ")} for item in errors
    ]
    sentence = "; ".join(f"{problem['field'] or 'request'}: {problem['message']}" for problem in problems)
    return InvalidRequest(f"The request cannot be used: {sentence}.", problems=problems)


def _name_field(place: Sequence[int | str]) -> str:
    """Return a field's name as a user would write it, without the kind that a union adds below `source`."""
    parts = [str(part) for part in place if part != "body"]
    return ".".join(
        part
        for position, part in enumerate(parts)
        if not (part in _KINDS and parts[position - 1 : position] == ["source"])
    )


def parse_source(text: str) -> AnySource:
    """Read a source as people write it.

    A folder, `[hf://]OWNER/NAME[@REVISION]`, `https://HOST/FOLDER/`, `s3://BUCKET/PREFIX`, or a request's `source` as
    JSON. Raises `SourceNotFound` when it is none of them, and `InvalidRequest`.
    """
    if text.startswith(("https://", "http://")):
        return _check_source({"kind": "https", "url": text})
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        return _check_source({"kind": "s3", "bucket": bucket, "prefix": prefix})
    if text.startswith("{"):
        try:
            return _check_source(parse_json(text))
        except JsonInvalid as error:
            raise InvalidRequest(f"The source as JSON {error}.") from None
    is_hub = text.startswith("hf://")
    if not is_hub and Path(text).expanduser().is_dir():
        return FolderSource(path=str(Path(text).expanduser().resolve()))
    repo, _, revision = text.removeprefix("hf://").partition("@")
    # A folder that has the first part of the name means that a folder was meant: nothing goes to the Hub by mistake.
    looks_like_path = not is_hub and (text.startswith((".", "/", "~")) or Path(text.split("/")[0]).exists())
    if looks_like_path or not _HUB_NAME.fullmatch(repo):
        raise SourceNotFound(
            f"{text!r} is neither a folder here nor a Hub repository. Give the folder that holds config.json, "
            "OWNER/NAME[@REVISION] (hf://OWNER/NAME where a folder OWNER stands in the way), or the address of a "
            "folder, https://HOST/FOLDER/ or s3://BUCKET/PREFIX.",
            source=text,
        )
    return HubSource(repo=repo, revision=revision or None)


def _check_source(document: Any) -> AnySource:
    try:
        return TypeAdapter[AnySource](Source).validate_python(document)
    except ValidationError as error:
        raise invalid_request([{**item, "loc": ("source", *item["loc"])} for item in error.errors()]) from None


def write_source(pinned: Mapping[str, Any], asked: AnySource) -> str:
    """Return a source as `parse_source` reads it, at the revision that it was pinned to, where words can say it."""
    if isinstance(asked, FolderSource):
        return asked.path
    if isinstance(asked, HubSource):
        return f"hf://{asked.repo}@{pinned['revision']}"
    if isinstance(asked, S3Source):
        return f"s3://{asked.bucket}/{asked.prefix}"
    if isinstance(asked, HttpsSource) and asked.files is None:
        return asked.url
    return asked.model_dump_json(exclude_none=True)
