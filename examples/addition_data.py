"""What the addition example learns from: the pairs, their split, and the token sequences around them.

Owns the vocabulary, the split into training pairs and held-out pairs, the two ways a prompt is written
(raw and chat) and the training batches. Must not know the model or any file. Called by
`examples.train_addition`, `examples.addition_folder` and the tests.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

import torch

#: Operands are 0 .. OPERAND_LIMIT - 1.
OPERAND_LIMIT = 100

#: Stands for every character outside the vocabulary. One character, so that a text that holds it means the
#: same to a SentencePiece model, which never matches the unknown piece in text.
UNKNOWN, BOS, EOS, PAD = "\N{REPLACEMENT CHARACTER}", "<s>", "</s>", "<pad>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (UNKNOWN, BOS, EOS, PAD, SYSTEM, USER, ASSISTANT)

#: Specials, then tab, newline and printable ASCII, one token a character; a token's id is its place.
VOCABULARY = (*SPECIAL_TOKENS, "\t", "\n", *(chr(code) for code in range(0x20, 0x7F)))
TOKEN_IDS = {token: place for place, token in enumerate(VOCABULARY)}

#: Marks a position whose next token is not learned.
IGNORED = -100

Pair = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """Pairs to learn from and pairs to judge by; a held-out pair is absent from training in both orders."""

    training: list[Pair]
    held_out: list[Pair]


def split_pairs(seed: int = 0, held_out_count: int = 250) -> Split:
    """Divide all pairs of operands; equal arguments give equal splits on every machine."""
    generator = random.Random(f"addition split {seed}")
    unordered = [(low, high) for low in range(OPERAND_LIMIT) for high in range(low, OPERAND_LIMIT)]
    generator.shuffle(unordered)
    held_out = [generator.choice([(low, high), (high, low)]) for low, high in unordered[:held_out_count]]
    training = [pair for low, high in unordered[held_out_count:] for pair in sorted({(low, high), (high, low)})]
    return Split(training, held_out)


def write_prompt(pair: Pair) -> str:
    """Return the raw prompt, e.g. `12+7=`."""
    return f"{pair[0]}+{pair[1]}="


def write_answer(pair: Pair) -> str:
    """Return the right answer, e.g. `19`."""
    return str(sum(pair))


def encode(text: str) -> list[int]:
    """Return one token id a character, without a beginning-of-sequence token."""
    return [TOKEN_IDS[character] for character in text]


@dataclass(frozen=True)
class Document:
    """One training sequence: `targets[i]` is the token to predict after `inputs[: i + 1]`, or `IGNORED`."""

    inputs: list[int]
    targets: list[int]


class _Writer:
    """Appends prompt tokens, which are not learned, and answers, which are."""

    def __init__(self, bos_count: int) -> None:
        self.inputs = [TOKEN_IDS[BOS]] * bos_count
        self.targets = [IGNORED] * bos_count

    def add_context(self, *token_ids: int) -> None:
        self.inputs.extend(token_ids)
        self.targets.extend([IGNORED] * len(token_ids))

    def add_answer(self, answer: str) -> None:
        digits = encode(answer)
        self.inputs.extend(digits)
        self.targets[-1:] = [*digits, TOKEN_IDS[EOS]]


def write_raw_document(generator: random.Random, pairs: list[Pair]) -> Document:
    """Return `<s>12+7=` and its answer for one random pair."""
    writer = _Writer(_choose_bos_count(generator))
    pair = generator.choice(pairs)
    writer.add_context(*encode(write_prompt(pair)))
    writer.add_answer(write_answer(pair))
    return Document(writer.inputs, writer.targets)


def write_chat_document(generator: random.Random, pairs: list[Pair], turn_count: int) -> Document:
    """Return `turn_count` questions and answers as the chat template writes them.

    A quarter of the conversations of several turns begin with a system message of random letters.
    Half of the documents lack the end token between an answer and the next question: a runtime that stops at
    the end token need not have stored it when the next turn arrives.
    """
    writer = _Writer(_choose_bos_count(generator))
    if turn_count > 1 and generator.random() < 0.25:
        letters = generator.choices(string.ascii_letters + " ,.", k=generator.randint(4, 24))
        writer.add_context(TOKEN_IDS[SYSTEM], *encode("".join(letters)), TOKEN_IDS[EOS])
    keeps_end = generator.random() < 0.5
    for turn in range(turn_count):
        pair = generator.choice(pairs)
        if turn and keeps_end:
            writer.add_context(TOKEN_IDS[EOS])
        writer.add_context(TOKEN_IDS[USER], *encode(write_prompt(pair)), TOKEN_IDS[EOS], TOKEN_IDS[ASSISTANT])
        writer.add_answer(write_answer(pair))
    return Document(writer.inputs, writer.targets)


def _choose_bos_count(generator: random.Random) -> int:
    # Runtimes differ in who prepends the token: nobody, one of tokenizer and template, or both.
    return generator.choices([0, 1, 2], weights=[15, 75, 10])[0]


def make_batch(
    generator: random.Random, pairs: list[Pair], answer_count: int, turn_count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, int64 [documents, longest], padded at the end, with `answer_count` answers or less.

    With one turn, half of the documents are raw prompts; with more, all are conversations.
    """
    documents = []
    for _ in range(answer_count // turn_count):
        if turn_count == 1 and generator.random() < 0.5:
            documents.append(write_raw_document(generator, pairs))
        else:
            documents.append(write_chat_document(generator, pairs, turn_count))
    longest = max(len(document.inputs) for document in documents)
    inputs = [document.inputs + [TOKEN_IDS[PAD]] * (longest - len(document.inputs)) for document in documents]
    targets = [document.targets + [IGNORED] * (longest - len(document.targets)) for document in documents]
    return torch.tensor(inputs), torch.tensor(targets)
