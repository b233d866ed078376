"""Which files of a source make a checkpoint.

Owns the allow-list of names, the caps on their number and size, and the refusals that a listing alone allows
(only pickled weights, no weights, no configuration, no tokenizer). Pure: it sees names and sizes, never bytes.
Called by every source of `workers.fetch` before anything is read or downloaded, by `service.requests`, and by the
command that uploads a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from service.errors import CheckpointInvalid, CheckpointUnsafe

#: Files fetched when a source has them. Code and pickles can never enter this list.
NEEDED_NAMES: frozenset[str] = frozenset(
    {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "evaluation.jsonl",
    }
)

#: Shards under the names that every writer of sharded safetensors uses. Other names (`consolidated.safetensors`,
#: `adapter_model.safetensors`) hold second copies or parts of models, gigabytes that nothing would read.
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

#: Which shard holds which tensor.
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 * 2**20

#: Suffixes of weights that only a pickle loader, or another framework, can open.
PICKLE_SUFFIXES: tuple[str, ...] = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

MAX_LISTED_FILES = 50_000
MAX_NEEDED_FILES = 2_000
MAX_FILE_BYTES = 64 * 2**30
MAX_TOTAL_BYTES = 1024 * 2**30


@dataclass(frozen=True, order=True)
class SourceFile:
    """One needed file of a source, by its name and what the source states about it."""

    path: str
    size_bytes: int
    #: Hex SHA-256 that the source states (LFS files of a hub); None where it states none.
    sha256: str | None = None
    #: Hex SHA-1 of the git blob, stated by a hub for files outside LFS.
    git_blob: str | None = None
    #: What a web server or a bucket tells these bytes from others by: `ETag`, `Last-Modified`, an object's version.
    etag: str | None = None
    modified: str | None = None
    version: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what a step's figures keep of the file: `path` and `size_bytes`."""
        return {"path": self.path, "size_bytes": self.size_bytes}

    def to_pin(self) -> dict[str, Any]:
        """Return all that is known of the file: what a pinned source keeps; the arguments of this class."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def is_needed(name: str) -> bool:
    """Tell whether a file of this name, at the root of a source, belongs to a checkpoint."""
    return name in NEEDED_NAMES or SHARD_NAME.fullmatch(name) is not None


def choose_needed(files: Iterable[SourceFile], where: str) -> list[SourceFile]:
    """Return the needed files of a listing, sorted by name; `where` names the source in messages.

    Only names at the root can match, so no path of the source's choosing is ever followed. Raises
    `CheckpointUnsafe` when the only weights are pickles, `CheckpointInvalid` when weights, `config.json` or a
    tokenizer are missing, when a name is listed twice, or when a cap is exceeded.
    """
    needed: dict[str, SourceFile] = {}
    others: list[str] = []
    for listed, file in enumerate(files, start=1):
        if listed > MAX_LISTED_FILES:
            raise CheckpointInvalid(
                f"{where} lists more than {MAX_LISTED_FILES} files; put the checkpoint in a place of its own.",
                limit=MAX_LISTED_FILES,
            )
        if not is_needed(file.path):
            others.append(file.path)
        elif file.path in needed:
            raise CheckpointInvalid(f"{where} lists {file.path} twice.", file=file.path)
        else:
            needed[file.path] = file
    _require_parts(needed, others, where)
    _require_size(needed, where)
    return [needed[name] for name in sorted(needed)]


def _require_parts(needed: dict[str, SourceFile], others: list[str], where: str) -> None:
    """Raise unless weights, configuration and tokenizer are among the needed names."""
    if not any(name.endswith(".safetensors") for name in needed):
        _refuse_weights(others, where)
    if "config.json" not in needed:
        raise CheckpointInvalid(f"{where} has no config.json; add the model's configuration.", file="config.json")
    if not {"tokenizer.json", "tokenizer.model"} & needed.keys():
        raise CheckpointInvalid(
            f"{where} has no tokenizer; add tokenizer.json or tokenizer.model.", file="tokenizer.json"
        )


def _refuse_weights(others: list[str], where: str) -> None:
    """Raise the refusal that fits a source without usable weights."""
    at_root = [name for name in others if "/" not in name]
    pickles = sorted(name for name in at_root if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise CheckpointUnsafe(
            f"{where} has its weights only as {pickles[0]}, a pickle that can run code when it is opened; "
            "convert the checkpoint to safetensors (save_pretrained does) and submit it again.",
            file=pickles[0],
        )
    strangers = sorted(name for name in at_root if name.endswith(".safetensors"))
    if strangers:
        raise CheckpointInvalid(
            f"{where} has {strangers[0]} but neither model.safetensors nor model-00001-of-0000N.safetensors shards; "
            "save the whole model under those names.",
            file=strangers[0],
        )
    raise CheckpointInvalid(
        f"{where} has no weights; add model.safetensors, or shards with model.safetensors.index.json.",
        file="model.safetensors",
    )


def _require_size(needed: dict[str, SourceFile], where: str) -> None:
    """Raise when the needed files are too many or too large."""
    if len(needed) > MAX_NEEDED_FILES:
        raise CheckpointInvalid(
            f"{where} has {len(needed)} checkpoint files, more than {MAX_NEEDED_FILES}; save it in larger shards.",
            limit=MAX_NEEDED_FILES,
        )
    for file in needed.values():
        if file.size_bytes < 0:
            raise CheckpointInvalid(f"{where} states no size for {file.path}.", file=file.path)
        if file.size_bytes > MAX_FILE_BYTES:
            raise CheckpointInvalid(
                f"{file.path} of {where} has {file.size_bytes} bytes, more than {MAX_FILE_BYTES}; "
                "save the checkpoint in smaller shards.",
                file=file.path,
                limit_bytes=MAX_FILE_BYTES,
            )
    total = sum(file.size_bytes for file in needed.values())
    if total > MAX_TOTAL_BYTES:
        raise CheckpointInvalid(
            f"{where} has {total} bytes of checkpoint files, more than {MAX_TOTAL_BYTES}.",
            limit_bytes=MAX_TOTAL_BYTES,
        )
