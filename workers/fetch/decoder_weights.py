"""Which weights a decoder must have.

Owns the bounds beyond which no honest checkpoint lies. Which families exist, what their config fields mean and how
they name their tensors belongs to `workers.convert.architectures`. Pure; called by `workers.fetch.checkpoint`.
"""

from __future__ import annotations

from service.errors import CheckpointInvalid
from workers.convert.architectures import DecoderShape
from workers.convert.architectures.parameters import list_parameters

#: Upper bounds of config fields; what exceeds them is a mistake or an attack on the worker's memory.
BOUNDS: dict[str, int] = {
    "layers": 256,
    "hidden_size": 2**16,
    "intermediate_size": 2**19,
    "heads": 1024,
    "head_size": 2**12,
    "vocabulary_size": 2**20,
    "context_length": 2**24,
}


def require_bounds(shape: DecoderShape) -> None:
    """Raise `CheckpointInvalid` for a size beyond its bound."""
    for field, bound in BOUNDS.items():
        value = getattr(shape, field)
        if value > bound:
            raise CheckpointInvalid(
                f"config.json: {field.replace('_', ' ')} is {str(value)[:50]}; at most {bound} is taken.",
                file="config.json",
                field=field,
            )


def list_tensors(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight that the shape demands; tied embeddings leave out the output layer."""
    if shape.tensors:
        return dict(shape.tensors)
    return dict(tensor for parameter in list_parameters(shape) for tensor in parameter.tensors)
