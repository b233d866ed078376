"""What a template is, and how it lies in a folder: what a graph holds beside weights, and where weights belong.

Owns the format: `skeleton.bin` has the graph's bytes without those of weights, one stretch after another;
`template.json` says what stands between them and which checkpoints it is for. No weight of anybody is in it. Called by
`workers.convert.template` and `template_write`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from service.errors import BlobCorrupt, TemplateUnfit
from workers.convert import architectures
from workers.convert.architectures import DecoderShape
from workers.convert.template_map import Piece

SKELETON_FILE = "skeleton.bin"
TEMPLATE_FILE = "template.json"

_FORMAT = 1
_WORD_BYTES = 4
_COPY_BYTES = 1 << 24
#: What may change an output byte of `convert`.
_TOOLS = ("torch", "litert-torch", "litert-converter", "ai-edge-litert", "transformers", "numpy")
#: Fields of a `config.json` that no graph depends on.
_IGNORED_FIELDS = frozenset(
    {"_name_or_path", "auto_map", "bos_token_id", "dtype", "eos_token_id", "torch_dtype", "transformers_version"}
)


@dataclass(frozen=True)
class Template:
    """A graph without its weights."""

    #: What a checkpoint must be and be asked for, by field; see `describe_graph`.
    graph: Mapping[str, Any]
    #: Extents of every tensor that a checkpoint must have, by name.
    tensors: Mapping[str, tuple[int, ...]]
    #: Tensors that no byte of the graph depends on.
    unused: tuple[str, ...]
    #: In the order of the graph's file.
    pieces: tuple[Piece, ...]
    size_bytes: int
    skeleton_digest: str

    def list_gaps(self) -> Iterator[int]:
        """Yield how many bytes of the skeleton come before each piece, and after the last."""
        position = 0
        for piece in self.pieces:
            yield piece.begin_byte - position
            position = piece.begin_byte + piece.values * _WORD_BYTES
        yield self.size_bytes - position


def describe_graph(
    config: Mapping[str, Any], engine: str, prefill_lengths: list[int], context_length: int
) -> dict[str, Any]:
    """Return everything that a graph depends on but the weights, as JSON values.

    Of a config it is what the engine reads: the shape, or for `traced` all fields that are not known to be ignored.
    """
    if engine == "reauthored":
        shape: DecoderShape = architectures.find_family(config).read_shape(config)
        read = dataclasses.asdict(shape)
    else:
        read = {name: value for name, value in config.items() if name not in _IGNORED_FIELDS}
    description = {
        "engine": engine,
        "prefill_lengths": sorted(set(prefill_lengths)),
        "context_length": context_length,
        **{f"config.{name}": value for name, value in read.items()},
        **{f"tool.{name}": metadata.version(name) for name in _TOOLS},
    }
    loaded: dict[str, Any] = json.loads(json.dumps(description, sort_keys=True))
    return loaded


def require_same_graph(template: Template, wanted: Mapping[str, Any]) -> None:
    """Raise `TemplateUnfit`, naming the first difference, unless a template is of the wanted graph."""
    for name in sorted(template.graph.keys() | wanted.keys()):
        ours, theirs = template.graph.get(name), wanted.get(name)
        if ours != theirs:
            raise TemplateUnfit(
                f"The template has {_shorten(ours)} as {name}, and {_shorten(theirs)} is asked for.", field=name
            )


def _shorten(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def save_template(
    folder: Path,
    content: Any,
    graph: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    unused: tuple[str, ...],
    pieces: tuple[Piece, ...],
) -> Template:
    """Write the graph `content` without the pieces' bytes into `folder`; return the template."""
    template = Template(graph, tensors, unused, pieces, len(content), "")
    digest = hashlib.sha256()
    position = 0
    with (folder / SKELETON_FILE).open("wb") as stream:
        for gap, piece in zip(template.list_gaps(), (*pieces, None), strict=True):
            for begin in range(position, position + gap, _COPY_BYTES):
                block = content[begin : min(begin + _COPY_BYTES, position + gap)]
                digest.update(block)
                stream.write(block)
            position += gap + (piece.values * _WORD_BYTES if piece is not None else 0)
    template = dataclasses.replace(template, skeleton_digest=digest.hexdigest())
    document = {"format": _FORMAT, **dataclasses.asdict(template)}
    (folder / TEMPLATE_FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return template


def load_template(folder: Path) -> Template:
    """Read a template; raises `BlobCorrupt` for a skeleton that is not the one that was saved."""
    document = json.loads((folder / TEMPLATE_FILE).read_text(encoding="utf-8"))
    if document.pop("format") != _FORMAT:
        raise TemplateUnfit("The template was written by another version of EdgeKiln; build it again.")
    with (folder / SKELETON_FILE).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != document["skeleton_digest"]:
        raise BlobCorrupt(f"{SKELETON_FILE} has the digest {digest}, not {document['skeleton_digest']}.")
    document["tensors"] = {name: tuple(extents) for name, extents in document["tensors"].items()}
    document["unused"] = tuple(document["unused"])
    document["pieces"] = tuple(Piece(**{**piece, "axes": tuple(piece["axes"])}) for piece in document["pieces"])
    return Template(**document)
