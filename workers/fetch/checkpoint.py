"""A checkpoint's files judged together, before any library opens one.

Owns the order of the checks, the reading of config.json and generation_config.json, and the
comparison of tokenizer and embedding. Reads with plain file calls; never imports torch or transformers. Called by
`workers.fetch.plan`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.checkpoint_files import SourceFile, choose_needed
from service.errors import CheckpointInvalid, CheckpointUnsafe
from service.user_files import read_evaluation
from workers.convert.architectures import FAMILIES, DecoderShape, Family, find_family
from workers.convert.architectures.parameters import complete_names, describe_stored, find_embedding, find_output
from workers.fetch.chat_template import list_templates, try_template
from workers.fetch.decoder_weights import require_bounds
from workers.fetch.safetensors_header import TensorEntry
from workers.fetch.strict_json import read_json_object
from workers.fetch.tokenizer_files import TokenizerFacts, read_tokenizer, read_tokenizer_config
from workers.fetch.unsafe_fields import refuse_unsafe
from workers.fetch.weight_files import read_headers, require_finite, require_tied, require_weights
from workers.steps import Progress

MAX_CONFIG_BYTES = 256 * 1024

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

#: Names of the dtypes as PyTorch and config.json write them.
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed every check."""

    family: Family
    shape: DecoderShape
    tokenizer: TokenizerFacts
    parameters: int
    weights_bytes: int
    #: The dtype that most of the weights' bytes have.
    weights_dtype: str
    has_chat_template: bool
    has_evaluation: bool


def read_checkpoint(folder: Path, progress: Progress, *, is_code_ignored: bool = False) -> Checkpoint:
    """Check a folder of fetched files and return what they are.

    Cheap refusals come first, the scan of all weights last. `is_code_ignored`: take the built-in class where the files
    name code of their own. Raises `CheckpointInvalid`, `CheckpointUnsafe`,
    `ChatTemplateInvalid` and `ArchitectureUnsupported`, each naming file and reason.
    """
    progress("reading the configuration", 0.0)
    _require_files(folder)
    family, shape = _read_config(folder, is_code_ignored)
    tokenizer_config = read_tokenizer_config(folder, is_code_ignored=is_code_ignored)
    tokenizer = read_tokenizer(folder, tokenizer_config)
    if tokenizer.vocabulary_size > shape.vocabulary_size:
        raise CheckpointInvalid(
            f"The tokenizer gives out {tokenizer.vocabulary_size} ids but the embedding has {shape.vocabulary_size} "
            "rows (vocab_size in config.json); take the tokenizer that belongs to the model.",
            file="tokenizer.json",
            tokenizer_ids=tokenizer.vocabulary_size,
            embedding_rows=shape.vocabulary_size,
        )
    has_evaluation = bool(read_evaluation(None, folder))
    headers = read_headers(folder)
    entries = {tensor.name: tensor for header in headers for tensor in header.tensors}
    stored = complete_names(shape, entries)
    tensors = {name: entries[written] for name, written in stored.items()}
    if shape.has_open_weights:
        shape = describe_stored(shape, {name: tensor.shape for name, tensor in tensors.items()})
    weights = require_weights(shape, tensors)
    templates = list_templates(folder, tokenizer_config)
    for place, template in templates.items():
        progress(f"trying the chat template in {place}", None)
        try_template(place, template, tokenizer_config)
    require_finite(headers, progress)
    if shape.tied_embeddings and find_output(shape) in stored:
        require_tied(headers, stored[find_embedding(shape)], stored[find_output(shape)])
    return Checkpoint(
        family=family,
        shape=shape,
        tokenizer=tokenizer,
        parameters=sum(tensor.elements for tensor in weights),
        weights_bytes=sum(tensor.size_bytes for tensor in weights),
        weights_dtype=_find_dtype(weights),
        has_chat_template=bool(templates),
        has_evaluation=has_evaluation,
    )


def _require_files(folder: Path) -> None:
    """Refuse links and whatever a listing alone can tell."""
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise CheckpointUnsafe(f"{path.name} is a link; a checkpoint consists of plain files.", file=path.name)
        if path.is_file():
            files.append(SourceFile(path.name, path.stat().st_size))
    choose_needed(files, "The checkpoint")


def _read_config(folder: Path, is_code_ignored: bool) -> tuple[Family, DecoderShape]:
    config = read_json_object(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    names = config.get("architectures")
    is_built_in = isinstance(names, list) and any(name in FAMILIES for name in names if isinstance(name, str))
    refuse_unsafe(config, CONFIG_FILE, is_code_ignored=is_code_ignored, is_built_in=is_built_in)
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or len(names[0]) > 100:
        raise CheckpointInvalid(
            "config.json: architectures must be a list of one name, such as ['LlamaForCausalLM'].",
            file=CONFIG_FILE,
            field="architectures",
        )
    family = find_family(config)
    # transformers builds what model_type says, the engines what architectures says: they must agree.
    if config.get("model_type") != family.name:
        raise CheckpointInvalid(
            f"config.json: model_type is {str(config.get('model_type'))[:100]!r}, but {family.architecture} has "
            f"{family.name!r}.",
            file=CONFIG_FILE,
            field="model_type",
        )
    shape = family.read_shape(config)
    require_bounds(shape)
    _require_token_ids(config, CONFIG_FILE, shape.vocabulary_size)
    if (folder / GENERATION_FILE).is_file():
        generation = read_json_object(folder / GENERATION_FILE, MAX_CONFIG_BYTES)
        refuse_unsafe(generation, GENERATION_FILE, is_code_ignored=is_code_ignored)
        _require_token_ids(generation, GENERATION_FILE, shape.vocabulary_size)
    return family, shape


def _require_token_ids(document: dict[str, Any], name: str, vocabulary_size: int) -> None:
    for field in _TOKEN_ID_FIELDS:
        value = document.get(field)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        # Some writers state "no padding" as -1.
        lowest = -1 if field == "pad_token_id" else 0
        if not all(type(each) is int and lowest <= each < vocabulary_size for each in ids):
            raise CheckpointInvalid(
                f"{name}: {field} is {str(value)[:100]}, which is no id below vocab_size ({vocabulary_size}).",
                file=name,
                field=field,
            )


def _find_dtype(weights: list[TensorEntry]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in weights:
        sizes[tensor.dtype] += tensor.size_bytes
    return DTYPE_NAMES[sizes.most_common(1)[0][0]]
