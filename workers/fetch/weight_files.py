"""A checkpoint's weight files, compared with their index and with config.json.

Owns those comparisons and the search for values that are not finite. Reads with plain file calls in bounded
memory. Called by `workers.fetch.checkpoint`.
"""

from __future__ import annotations

from pathlib import Path

from service.checkpoint_files import INDEX_FILE, MAX_INDEX_BYTES, SHARD_NAME
from service.errors import CheckpointInvalid, CheckpointUnsafe
from workers.convert.architectures import DecoderShape
from workers.convert.architectures.parameters import (
    find_output,
    is_ignored,
    require_none_extra,
    require_none_missing,
)
from workers.fetch.decoder_weights import list_tensors
from workers.fetch.safetensors_header import SafetensorsHeader, TensorEntry, read_header, scan_nonfinite
from workers.fetch.sources import CHUNK_BYTES, ByteProgress
from workers.fetch.strict_json import read_json_object
from workers.steps import Progress

SINGLE_FILE = "model.safetensors"


def read_headers(folder: Path) -> list[SafetensorsHeader]:
    """Read the headers of all weight files and compare them with the index."""
    present = sorted(
        path.name for path in folder.iterdir() if path.name == SINGLE_FILE or SHARD_NAME.fullmatch(path.name)
    )
    if not (folder / INDEX_FILE).is_file():
        if present != [SINGLE_FILE]:
            raise CheckpointInvalid(
                f"The weights lie in {', '.join(present[:3])} but {INDEX_FILE} is missing; add it.", file=INDEX_FILE
            )
        return [read_header(folder / SINGLE_FILE)]
    placed = _read_index(folder)
    named = set(placed.values())
    for name in sorted(named - set(present)):
        raise CheckpointInvalid(f"The shard {name}, named by {INDEX_FILE}, is missing.", file=name)
    for name in sorted(set(present) - named):
        raise CheckpointInvalid(f"{INDEX_FILE} does not name {name}; remove the one or the other.", file=name)
    headers = [read_header(folder / name) for name in present]
    found: dict[str, str] = {}
    for header in headers:
        for tensor in header.tensors:
            if placed.get(tensor.name) != header.path.name:
                stated = placed.get(tensor.name)
                where = f"in {stated}" if stated else "nowhere"
                raise CheckpointInvalid(
                    f"{header.path.name} holds tensor {tensor.name!r}, which {INDEX_FILE} places {where}.",
                    file=header.path.name,
                    tensor=tensor.name,
                )
            found[tensor.name] = header.path.name
    for tensor_name in sorted(placed.keys() - found.keys()):
        raise CheckpointInvalid(
            f"{INDEX_FILE} places tensor {tensor_name[:200]!r} in {placed[tensor_name]}, which does not hold it.",
            file=placed[tensor_name],
            tensor=tensor_name[:200],
        )
    return headers


def _read_index(folder: Path) -> dict[str, str]:
    """Return the index's map from tensor to file; only names that a checkpoint can have are let through."""
    weight_map = read_json_object(folder / INDEX_FILE, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointInvalid(f"{INDEX_FILE} has no weight_map.", file=INDEX_FILE)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not (name == SINGLE_FILE or SHARD_NAME.fullmatch(name)):
            raise CheckpointUnsafe(
                f"{INDEX_FILE} places tensor {tensor[:200]!r} in {str(name)[:100]!r}, not a shard's name.",
                file=INDEX_FILE,
                tensor=tensor[:200],
            )
    return weight_map


def require_weights(shape: DecoderShape, tensors: dict[str, TensorEntry]) -> list[TensorEntry]:
    """Return the entries that the model's parameters live in; raises where config and weights disagree."""
    expected = list_tensors(shape)
    require_none_missing([name for name in expected if name not in tensors])
    optional = {find_output(shape): (shape.vocabulary_size, shape.hidden_size)} if shape.tied_embeddings else {}
    for name, wanted in {**expected, **optional}.items():
        if name in tensors and tensors[name].shape != wanted:
            raise CheckpointInvalid(
                f"The tensor {name!r} has shape {list(tensors[name].shape)}; config.json demands {list(wanted)}.",
                tensor=name,
                found_shape=list(tensors[name].shape),
                expected_shape=list(wanted),
            )
    known = expected.keys() | optional.keys()
    require_none_extra(sorted(name for name in tensors if name not in known and not is_ignored(name)))
    return [tensors[name] for name in expected]


def require_finite(headers: list[SafetensorsHeader], progress: Progress) -> None:
    """Read all weights once and refuse NaN and infinity."""
    sizes = {header.path.name: sum(tensor.size_bytes for tensor in header.tensors) for header in headers}
    count = ByteProgress(progress, "scanning", sum(sizes.values()))
    for header in headers:
        name = header.path.name
        found = scan_nonfinite(header, lambda size_bytes, name=name: count.add(size_bytes, name))  # type: ignore[misc]
        if found:
            listed = ", ".join(f"{each.tensor} ({each.count})" for each in found[:5])
            rest = f" and {len(found) - 5} more tensors" if len(found) > 5 else ""
            raise CheckpointInvalid(
                f"{name} holds values that are NaN or infinite: {listed}{rest}; the checkpoint is damaged.",
                file=name,
                tensor=found[0].tensor,
                count=found[0].count,
            )


def require_tied(headers: list[SafetensorsHeader], embedding_name: str, output_name: str) -> None:
    """Refuse an output layer that config.json calls tied but that differs from the embedding; takes stored names."""
    places = {tensor.name: (header.path, tensor) for header in headers for tensor in header.tensors}
    (path, embedding), (other_path, output) = places[embedding_name], places[output_name]
    is_same = embedding.dtype == output.dtype
    with path.open("rb") as stream, other_path.open("rb") as other:
        stream.seek(embedding.begin_byte)
        other.seek(output.begin_byte)
        left = embedding.size_bytes
        while is_same and left:
            size = min(left, CHUNK_BYTES)
            is_same = stream.read(size) == other.read(size)
            left -= size
    if not is_same:
        raise CheckpointInvalid(
            f"config.json says that embeddings are tied, but {output_name} in {other_path.name} differs from "
            f"{embedding_name}; set tie_word_embeddings to false or remove the tensor.",
            file=other_path.name,
            tensor=output_name,
        )
