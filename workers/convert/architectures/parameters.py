"""Which tensors a checkpoint of a shape must hold, and which parameter of the rebuilt decoder each one fills. Pure.

The one place that joins both: `workers.fetch.decoder_weights` takes names and shapes from it before anything is
opened, `workers.convert.reauthored` fills the model by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from service.errors import CheckpointInvalid
from workers.convert.architectures.shape import DecoderShape

#: Buffers that old writers stored beside the weights; every loader computes them anew.
IGNORED_TENSOR = re.compile(
    r"(model|transformer)\.(layers|h)\.\d+\.(self_attn|self_attention)\.rotary_emb\.inv_freq"
    r"|transformer\.h\.\d+\.attn\.(masked_)?bias"
)


def is_ignored(tensor: str) -> bool:
    """Return whether a stored tensor is such a buffer; checkpoints of the bare model leave the prefix out."""
    return any(IGNORED_TENSOR.fullmatch(prefix + tensor) for prefix in ("", "model.", "transformer."))


def require_none_missing(names: Sequence[str]) -> None:
    """Raise `CheckpointInvalid` for tensors that must be stored and are not."""
    if names:
        raise CheckpointInvalid(
            f"The weights lack {_count(names)} that config.json demands: {_name_some(names)}.", tensors=list(names[:20])
        )


def require_none_extra(names: Sequence[str]) -> None:
    """Raise `CheckpointInvalid` for tensors that are stored and have no place in the model."""
    if names:
        raise CheckpointInvalid(
            f"The weights hold {_count(names)} that config.json gives no place: {_name_some(names)}.",
            tensors=list(names[:20]),
        )


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _name_some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


@dataclass(frozen=True)
class Parameter:
    """One parameter of the rebuilt decoder and the tensors whose rows, one after another, it consists of."""

    name: str
    #: Names and shapes as they lie in the checkpoint.
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    #: Whether each tensor lies as [inputs, outputs].
    is_transposed: bool = False
    #: Whether the rows are queries, key and value of each group, and not all queries, all keys, all values.
    is_grouped: bool = False


def list_parameters(shape: DecoderShape) -> Iterator[Parameter]:
    """Yield every parameter; a tied output layer is the embedding and not among them."""
    names, hidden = shape.names, shape.hidden_size
    yield _take("tok_embedding.weight", f"{names.prefix}{names.embedding}.weight", shape.vocabulary_size, hidden)
    if names.positions is not None:
        yield _take("positions.weight", f"{names.prefix}{names.positions}.weight", shape.context_length, hidden)
    for layer in range(shape.layers):
        yield from _list_layer(shape, layer)
    yield from _list_norm(shape, "final_norm", names.prefix + names.final_norm, hidden)
    if not shape.tied_embeddings:
        yield _take("lm_head.weight", find_output(shape), shape.vocabulary_size, hidden)
    if shape.output_bias:
        yield _take("lm_head.bias", f"{names.output}.bias", shape.vocabulary_size)


def leave_undescribed(shape: DecoderShape) -> DecoderShape:
    """Return the shape with nothing but its weights described, for a family that is stored so and computes more."""
    return replace(shape, tensors=tuple(each for parameter in list_parameters(shape) for each in parameter.tensors))


def describe_stored(shape: DecoderShape, stored: Mapping[str, tuple[int, ...]]) -> DecoderShape:
    """Return the shape with the stored weights (full name -> extents) as those that it must have, and its embedding.

    An output layer beside tied embeddings is none of them.
    """
    left_out = {find_output(shape)} if shape.tied_embeddings else set()
    tensors = {name: extents for name, extents in stored.items() if name not in left_out}
    embedding = {find_embedding(shape): (shape.vocabulary_size, shape.hidden_size)}
    return replace(shape, tensors=tuple((tensors | embedding).items()))


def list_row_lengths(shape: DecoderShape) -> dict[str, int]:
    """Return how many inputs each matrix has, embeddings among them, by the name of its tensor in the checkpoint."""
    lengths = {name: extents[-1] for name, extents in shape.tensors if len(extents) == 2}
    for parameter in () if shape.tensors else list_parameters(shape):
        for name, extents in parameter.tensors:
            if len(extents) == 2:
                lengths[name] = extents[0] if parameter.is_transposed else extents[1]
    return lengths


def find_embedding(shape: DecoderShape) -> str:
    """Return the name of the embedding's tensor."""
    return f"{shape.names.prefix}{shape.names.embedding}.weight"


def find_output(shape: DecoderShape) -> str:
    """Return the name of the output layer's tensor, absent where embeddings are tied."""
    return f"{shape.names.output}.weight"


def complete_names(shape: DecoderShape, stored: Iterable[str]) -> dict[str, str]:
    """Return the stored name of each tensor by its full name: checkpoints of the bare model leave the prefix out."""
    names = list(stored)
    prefix, output = shape.names.prefix, shape.names.output
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    return {name if name.startswith(f"{output}.") else prefix + name: name for name in names}


def _take(name: str, tensor: str, *extents: int) -> Parameter:
    return Parameter(name, ((tensor, extents),))


def _list_layer(shape: DecoderShape, layer: int) -> Iterator[Parameter]:
    names, hidden = shape.names, shape.hidden_size
    ours, theirs = f"transformer_blocks.{layer}.", names.prefix + names.layer.format(layer)
    sizes = shape.find_sizes(layer)
    queries, keys = sizes.heads * shape.head_size, sizes.key_value_heads * shape.head_size
    yield from _list_norm(shape, ours + "attention_norm", theirs + names.attention_norm, hidden)
    yield from _list_linear(
        shape,
        ours + "attention.inputs",
        [theirs + each for each in names.attention_inputs],
        [queries, keys, keys],
        hidden,
        shape.attention_bias,
        is_grouped=shape.is_grouped,
    )
    for own, name in (("query_norm", names.query_norm), ("key_norm", names.key_norm)):
        if name is not None:
            yield from _list_norm(shape, f"{ours}attention.{own}", theirs + name, shape.head_size)
    output = [theirs + names.attention_output]
    yield from _list_linear(shape, ours + "attention.output", output, [hidden], queries, shape.attention_output_bias)
    for own, name in (
        ("attention_output_norm", names.attention_output_norm),
        ("feed_forward_norm", names.feed_forward_norm),
        ("feed_forward_output_norm", names.feed_forward_output_norm),
    ):
        if name is not None:
            yield from _list_norm(shape, ours + own, theirs + name, hidden)
    inner, bias = sizes.intermediate_size, shape.feed_forward_bias
    # Gate and up stay apart where the checkpoint holds them apart.
    parts = names.feed_forward_inputs
    rows = [inner * 2 if shape.is_gated and len(parts) == 1 else inner]
    for own, name in zip(("gate", "up"), parts, strict=False):
        yield from _list_linear(shape, f"{ours}feed_forward.{own}", [theirs + name], rows, hidden, bias)
    output = [theirs + names.feed_forward_output]
    yield from _list_linear(shape, ours + "feed_forward.output", output, [hidden], inner, bias)


def _list_norm(shape: DecoderShape, name: str, tensor: str, size: int) -> Iterator[Parameter]:
    yield _take(f"{name}.weight", f"{tensor}.weight", size)
    if shape.norm == "layer":
        yield _take(f"{name}.bias", f"{tensor}.bias", size)


def _list_linear(
    shape: DecoderShape,
    name: str,
    tensors: list[str],
    rows: list[int],
    inputs: int,
    has_bias: bool,
    is_grouped: bool = False,
) -> Iterator[Parameter]:
    if len(tensors) == 1:
        rows = [sum(rows)]
    extents = [(inputs, each) if shape.is_transposed else (each, inputs) for each in rows]
    weights = tuple((f"{tensor}.weight", each) for tensor, each in zip(tensors, extents, strict=True))
    yield Parameter(f"{name}.weight", weights, shape.is_transposed, is_grouped)
    if has_bias:
        biases = tuple((f"{tensor}.bias", (each,)) for tensor, each in zip(tensors, rows, strict=True))
        yield Parameter(f"{name}.bias", biases, is_grouped=is_grouped)
