"""Perplexity on a text: which tokens are scored, and how losses become figures. Pure.

Owns the windows of the text and the figures of perplexity. Must not run a model or judge a figure. Called by
`workers.verify.reference`, which scores the windows with the source, and by `workers.verify.verify`, which scores the
same windows with the graph or the bundle's runtime.

A window is a text of its own: each of its tokens but the first is predicted from those before it. LiteRT-LM's
`run_text_scoring` (0.18.1) scores so: natural logarithms, one a token, of a text shorter than the context; what it says
of the first token is arbitrary, and so is everything behind `run_prefill`. The start token is therefore written out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workers.verify.probe import Tokens

#: Scored when the user gives no text: a few sentences of several kinds, as plain as users' own.
DEFAULT_TEXT = """\
A kiln is a furnace for clay. The potter loads it in the evening, lights it before dawn, and waits. For the first hours
the fire is kept low, because water that is still in the clay would turn to steam and crack it. Then the heat is raised,
slowly, until the glaze melts and runs. At 1,040 degrees the bricks glow orange; at 1,280 they are almost white. Nobody
opens the door before the second day. What went in as 24 grey bowls may come out as 22 blue ones, and two that nobody
wanted. "That is what the fire is for," she said, and wrote the numbers down: 12 + 7 = 19, 40 + 2 = 42.
"""

#: Tokens in a window, the start token included; a longer window costs no less a token and says little more.
WINDOW_TOKENS = 256
#: Tokens scored of the default text and, at most, of a user's: each costs a decode step of every artifact.
DEFAULT_SCORED_TOKENS = 96
MAX_SCORED_TOKENS = 1024
#: Fewer scored tokens than these are no text.
MIN_SCORED_TOKENS = 16

#: The text is divided between words, and within what has no blanks.
_PIECE = re.compile(r"\s*\S{1,4}")


@dataclass(frozen=True)
class Window:
    """A part of the text and how the source predicts it."""

    text: str
    #: The source's tokens, the start token in front where its tokenizer puts one.
    tokens: Tokens
    #: Sum of the source's losses of all tokens but the first, in nats.
    loss: float
    #: The same without the start token, for runtimes that cannot be told it; None where there is none.
    plain_loss: float | None

    @property
    def scored_tokens(self) -> int:
        """How many tokens `loss` counts."""
        return len(self.tokens) - 1

    def to_json(self) -> dict[str, Any]:
        """Return the form that `reference.json` keeps."""
        return asdict(self)


def divide_text(
    encode: Callable[[str], Tokens], text: str, context_length: int, limit_tokens: int
) -> list[tuple[str, Tokens]]:
    """Return windows as (text, tokens), in order, until `limit_tokens` are scored.

    `encode` puts the start token in front. The runtime scores texts shorter than the context.
    """
    pieces = _PIECE.findall(text)
    windows: list[tuple[str, Tokens]] = []
    start, left = 0, limit_tokens
    while start < len(pieces) and left > 0:
        room = min(WINDOW_TOKENS, context_length - 1, left + 1)
        low, high = 0, min(len(pieces) - start, room)
        while low < high:
            middle = (low + high + 1) // 2
            if len(encode("".join(pieces[start : start + middle]).lstrip())) <= room:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            # Not even a few characters fit; what follows may.
            start += 1
            continue
        part = "".join(pieces[start : start + low]).lstrip()
        tokens = encode(part)
        start += low
        if len(tokens) > 1:
            windows.append((part, tokens))
            left -= len(tokens) - 1
    return windows


def measure_perplexity(losses: Sequence[float], windows: Sequence[Window], *, is_plain: bool = False) -> float:
    """Return exp of the mean loss a token. `is_plain`: the losses are of windows without their start token."""
    tokens = sum(window.scored_tokens - (1 if is_plain else 0) for window in windows)
    return math.exp(sum(losses) / tokens)


def describe_perplexity(
    losses: Sequence[float | None], windows: Sequence[Window], *, is_plain: bool = False
) -> dict[str, float | int]:
    """Return the figures of an artifact's losses beside the source's on the same tokens.

    `losses`: nats by window; None where the artifact reads other tokens, which is skipped. Without any other window the
    perplexity is absent.
    """
    pairs = [(loss, window) for loss, window in zip(losses, windows, strict=True) if loss is not None]
    figures: dict[str, float | int] = {"text_windows": len(windows), "text_windows_skipped": len(windows) - len(pairs)}
    if not pairs:
        return figures
    scored = [window for _, window in pairs]
    own = measure_perplexity([loss for loss, _ in pairs], scored, is_plain=is_plain)
    expected = [window.plain_loss or 0.0 if is_plain else window.loss for window in scored]
    source = measure_perplexity(expected, scored, is_plain=is_plain)
    return {
        **figures,
        "text_tokens": sum(window.scored_tokens - (1 if is_plain else 0) for window in scored),
        "text_perplexity": own,
        "source_text_perplexity": source,
        "perplexity_increase": own / source - 1.0,
    }
