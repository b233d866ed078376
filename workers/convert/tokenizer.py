"""A checkpoint's tokenizer in the form a bundle can carry, and how faithful that form is.

Owns the rebuilding of a SentencePiece model from `tokenizer.json` and the measuring of its mismatch. Called by
`workers.convert.bundle`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from service.errors import TokenizerUnsupported
from workers.convert.tokenizer_samples import SAMPLES

HF_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"

#: A rebuilt tokenizer that reads more of the sample otherwise is another tokenizer, not an approximation.
MAX_MISMATCH_RATIO = 0.5

#: Special tokens compared at most; some vocabularies hold hundreds of reserved ones.
_MAX_SPECIAL_TOKENS = 8

_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece
_WORD_START = "▁"


@dataclass(frozen=True)
class CarriedTokenizer:
    """A tokenizer as it goes into a bundle."""

    #: `hf_json`: tokenizer.json as it is. `sentencepiece`: from tokenizer.model. `sentencepiece_rebuilt`: from
    #: tokenizer.json.
    kind: str
    content: bytes
    #: Share of the samples that it splits into other tokens than tokenizer.json does, in [0, 1].
    mismatch_ratio: float
    #: How many texts were compared; 0 where nothing was rebuilt and there is nothing to compare with.
    samples: int

    def to_figures(self) -> dict[str, Any]:
        """Return the figures of the step `bundle` about the tokenizer."""
        return {"kind": self.kind, "mismatch_ratio": self.mismatch_ratio, "samples": self.samples}


def carry_as_is(checkpoint_dir: Path) -> CarriedTokenizer:
    """Return the tokenizer for a format that takes both kinds: tokenizer.json, else tokenizer.model.

    Raises `TokenizerUnsupported` when the checkpoint has neither.
    """
    hf_path = checkpoint_dir / HF_FILE
    if hf_path.is_file():
        return CarriedTokenizer("hf_json", hf_path.read_bytes(), 0.0, 0)
    return _read_sentencepiece(checkpoint_dir)


def carry_as_sentencepiece(checkpoint_dir: Path) -> CarriedTokenizer:
    """Return a SentencePiece model: the checkpoint's own, else one rebuilt from tokenizer.json, compared with it.

    Raises `TokenizerUnsupported` when tokenizer.json holds something that SentencePiece cannot express, or when
    the rebuilt model reads more than `MAX_MISMATCH_RATIO` of the samples otherwise.
    """
    hf_path = checkpoint_dir / HF_FILE
    if (checkpoint_dir / SENTENCEPIECE_FILE).is_file():
        own = _read_sentencepiece(checkpoint_dir)
        if not hf_path.is_file():
            return own
        definition = json.loads(hf_path.read_text(encoding="utf-8"))
        content, kind = own.content, own.kind
    else:
        if not hf_path.is_file():
            raise _missing()
        definition = json.loads(hf_path.read_text(encoding="utf-8"))
        content, kind = build_sentencepiece(definition), "sentencepiece_rebuilt"
    texts = [*SAMPLES, *_write_special_tokens(definition), *_read_prompts(checkpoint_dir)]
    ratio = measure_mismatch(Tokenizer.from_file(str(hf_path)), content, texts)
    if ratio > MAX_MISMATCH_RATIO:
        raise TokenizerUnsupported(
            f"The tokenizer cannot be carried as SentencePiece: {ratio:.0%} of {len(texts)} sample texts would be read "
            "otherwise. Ask for the format 'litertlm', which carries tokenizer.json as it is.",
            mismatch_ratio=ratio,
            samples=len(texts),
        )
    return CarriedTokenizer(kind, content, ratio, len(texts))


def measure_mismatch(original: Tokenizer, content: bytes, texts: list[str]) -> float:
    """Return the share of `texts` that a SentencePiece model splits into other ids than `original` does."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    wrong = sum(processor.encode(text) != original.encode(text, add_special_tokens=False).ids for text in texts)
    return float(wrong / len(texts))


def build_sentencepiece(definition: dict[str, Any]) -> bytes:
    """Return a SentencePiece BPE model with the ids and merge order of a `tokenizer.json`.

    What SentencePiece has no words for stays an approximation: splitting by a regular expression before
    merging, and tokens that hold a part of a character. Raises `TokenizerUnsupported` for anything but BPE.
    """
    model = definition.get("model", {})
    if model.get("type") != "BPE":
        raise TokenizerUnsupported(
            f"tokenizer.json holds a {model.get('type')!r} model; only 'BPE' can be rebuilt as SentencePiece. Ask for "
            "the format 'litertlm', which carries tokenizer.json as it is.",
            model=model.get("type"),
        )
    alphabet = _ByteAlphabet() if _find(definition, "ByteLevel") else None
    uses_word_start = alphabet is None and _marks_words(definition)
    texts = _list_tokens(definition)
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model.get("merges", [])):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    added = {token["id"]: token["content"] for token in definition.get("added_tokens", [])}
    unknown = model.get("unk_token")
    proto = sentencepiece_model_pb2.ModelProto()
    seen: set[str] = set()
    for token_id, text in enumerate(texts):
        piece, kind = _describe_piece(token_id, text, added, unknown, alphabet)
        if piece in seen:
            # SentencePiece demands distinct pieces; this one is never produced, but its id must stay taken.
            piece, kind = f"<unused_{token_id}>", _PIECE.UNUSED
        seen.add(piece)
        is_merged = kind == _PIECE.NORMAL
        proto.pieces.add(piece=piece, score=-float(ranks.get(text or "", len(ranks))) if is_merged else 0.0, type=kind)
    _complete(proto, seen, has_bytes=alphabet is not None or bool(model.get("byte_fallback")))
    _describe_text(proto, uses_word_start, _adds_first_space(definition))
    return bytes(proto.SerializeToString(deterministic=True))


def _describe_piece(
    token_id: int, text: str | None, added: dict[int, str], unknown: str | None, alphabet: _ByteAlphabet | None
) -> tuple[str, int]:
    """Return the piece and its type for one id."""
    if text is None:
        return f"<unused_{token_id}>", _PIECE.UNUSED
    if text == unknown:
        return text, _PIECE.UNKNOWN
    if token_id in added:
        # Found in the text itself, as transformers does; so a chat template may write it out.
        return text, _PIECE.USER_DEFINED
    if alphabet is None:
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        return text, _PIECE.BYTE if is_byte else _PIECE.NORMAL
    return alphabet.describe(token_id, text)


class _ByteAlphabet:
    """The 256 characters by which GPT-2 and Llama 3 write bytes. Source: GPT-2, `encoder.py`, `bytes_to_unicode`."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in printable]
        self._byte_of = {chr(byte): byte for byte in printable}
        self._byte_of.update({chr(256 + index): byte for index, byte in enumerate(hidden)})

    def describe(self, token_id: int, text: str) -> tuple[str, int]:
        """Return piece and type: text where the bytes are whole characters, a byte piece for a lone byte."""
        try:
            content = bytes(self._byte_of[character] for character in text)
        except KeyError:
            return text, _PIECE.NORMAL
        if len(content) == 1 and (content[0] >= 0x80 or content[0] == 0):
            return f"<0x{content[0]:02X}>", _PIECE.BYTE
        try:
            return content.decode("utf-8"), _PIECE.NORMAL
        except UnicodeDecodeError:
            # A part of a character: never read from text, where SentencePiece takes single bytes instead. It may be
            # generated, and shows as a replacement character, told apart from others by invisible ones.
            mark = format(token_id, "b").translate({ord("0"): "\u200b", ord("1"): "\u200c"})
            return "\ufffd" + mark, _PIECE.UNUSED


def _complete(proto: Any, seen: set[str], *, has_bytes: bool) -> None:
    """Add, past the vocabulary, the pieces that SentencePiece demands of every model and never produces here."""
    if has_bytes:
        proto.trainer_spec.byte_fallback = True
        for byte in range(256):
            piece = f"<0x{byte:02X}>"
            if piece not in seen:
                proto.pieces.add(piece=piece, score=0.0, type=_PIECE.BYTE)
    unknown_ids = [index for index, piece in enumerate(proto.pieces) if piece.type == _PIECE.UNKNOWN]
    if not unknown_ids:
        unknown_ids = [len(proto.pieces)]
        proto.pieces.add(piece="<unknown>", score=0.0, type=_PIECE.UNKNOWN)
    spec = proto.trainer_spec
    spec.model_type = spec.BPE
    spec.vocab_size = len(proto.pieces)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = unknown_ids[0], -1, -1, -1
    spec.unk_piece = proto.pieces[unknown_ids[0]].piece
    spec.unk_surface = spec.unk_piece


def _describe_text(proto: Any, uses_word_start: bool, adds_first_space: bool) -> None:
    """Say how text becomes characters: nothing is normalised; spaces are marked only where the original does."""
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    normalizer.add_dummy_prefix = adds_first_space
    normalizer.escape_whitespaces = uses_word_start
    proto.denormalizer_spec.name = "identity"


def _list_tokens(definition: dict[str, Any]) -> list[str | None]:
    """Return the token of every id, None where ids have gaps."""
    by_id = {token_id: text for text, token_id in definition["model"].get("vocab", {}).items()}
    by_id.update({token["id"]: token["content"] for token in definition.get("added_tokens", [])})
    return [by_id.get(token_id) for token_id in range(max(by_id) + 1)]


def _find(definition: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the normalizers and pre-tokenizers of a kind, those in sequences too."""
    found: list[dict[str, Any]] = []
    waiting = [definition.get("normalizer"), definition.get("pre_tokenizer")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += [*part.get("normalizers", []), *part.get("pretokenizers", [])]
            if part.get("type") == kind:
                found.append(part)
    return found


def _marks_words(definition: dict[str, Any]) -> bool:
    """Say whether spaces become the word-start mark before splitting."""
    replaced = any(part.get("content") == _WORD_START for part in _find(definition, "Replace"))
    return replaced or bool(_find(definition, "Metaspace"))


def _adds_first_space(definition: dict[str, Any]) -> bool:
    """Say whether a text gets a space in front."""
    if any(part.get("prepend") == _WORD_START for part in _find(definition, "Prepend")):
        return True
    if any(part.get("prepend_scheme", "always") != "never" for part in _find(definition, "Metaspace")):
        return True
    return any(part.get("add_prefix_space") for part in _find(definition, "ByteLevel"))


def _read_sentencepiece(checkpoint_dir: Path) -> CarriedTokenizer:
    path = checkpoint_dir / SENTENCEPIECE_FILE
    if not path.is_file():
        raise _missing()
    try:
        content = _make_special_tokens_readable(path.read_bytes())
    except DecodeError as error:
        raise TokenizerUnsupported(f"{SENTENCEPIECE_FILE} is not a SentencePiece model.") from error
    return CarriedTokenizer("sentencepiece", content, 0.0, 0)


def _make_special_tokens_readable(content: bytes) -> bytes:
    """Let special tokens be found in a text, as transformers finds them.

    SentencePiece never reads its control pieces from text, but LiteRT-LM renders a chat template to text and
    then splits it; without this the stop token that ends a turn would arrive as `<`, `/`, `s`, `>`.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    for piece in proto.pieces:
        if piece.type == _PIECE.CONTROL:
            piece.type = _PIECE.USER_DEFINED
    return bytes(proto.SerializeToString(deterministic=True))


def _write_special_tokens(definition: dict[str, Any]) -> list[str]:
    """Return texts that write out special tokens, as chat templates do; unknown text is none of them."""
    unknown = definition.get("model", {}).get("unk_token")
    names = [token["content"] for token in definition.get("added_tokens", []) if token["content"] != unknown]
    return [f"Hello{name}Hello" for name in names[:_MAX_SPECIAL_TOKENS]]


def _missing() -> TokenizerUnsupported:
    return TokenizerUnsupported(
        f"The checkpoint has neither {HF_FILE} nor {SENTENCEPIECE_FILE}; a bundle cannot be read without a tokenizer."
    )


def _read_prompts(checkpoint_dir: Path) -> list[str]:
    """Return the prompts of the checkpoint's own evaluation, when there is one."""
    path = checkpoint_dir / "evaluation.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
