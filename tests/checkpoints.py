"""Tiny random checkpoints in the standard Hugging Face layout, of any architecture that transformers has.

Owns how tests make checkpoints: weights, norms, tokenizer and chat template are random or trained on a few
lines, seeded, and written by `save_pretrained`. Equal arguments give equal bytes. Must not hold expectations
about what EdgeKiln does with them. Called by fixtures of every test folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from workers.verify import openelm

#: `byte_level`: Llama 3 style, every byte has a token. `metaspace`: Llama 2 style with byte fallback, as
#: `tokenizer.json` only. `sentencepiece`: the same, with its `tokenizer.model` beside it. `unigram`: pieces with
#: scores and byte fallback, as `tokenizer.json` only.
TokenizerKind = Literal["byte_level", "metaspace", "sentencepiece", "unigram"]
WeightsDtype = Literal["bfloat16", "float16", "float32"]

UNKNOWN_TOKEN, BOS_TOKEN, EOS_TOKEN = "<unk>", "<s>", "</s>"
SPECIAL_TOKENS = (UNKNOWN_TOKEN, BOS_TOKEN, EOS_TOKEN)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)

#: What a rope-scaled Llama 3 states, shrunk to a context of 256.
LLAMA3_ROPE_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Where a tokenizer with byte fallback has the tokens of single bytes.
BYTE_TOKENS = range(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + 256)

#: Llama 2 wrote every byte that no piece covers as one of these.
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))

#: Architectures that transformers has no class of.
OWN_CLASSES: dict[str, type[PreTrainedModel]] = {"OpenELMForCausalLM": openelm.OpenELMForCausalLM}

#: Parts of the names of embeddings, and ends of the names of matrices that lie as [inputs, outputs].
_EMBEDDINGS = ("embed_tokens", "token_embeddings", "word_embeddings", "wte", "wpe")
_TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
#: Architectures that store norms as a difference from one.
_NORMS_FROM_ONE = ("GemmaFor", "Gemma2", "Gemma3For", "Qwen3_5")

_CORPUS = (
    "The kiln is hot and the clay is wet. A model that was not run is not published.",
    "12+7=19 34+58=92 0 1 2 3 4 5 6 7 8 9 100 2024",
    "def quantize(path, recipe):\n    return Path(path).read_bytes()  # float32 -> int8\n",
    "user assistant system tokens prefill decode cache signature weight bias norm",
    "für naïve café déjà vu, el niño, smörgåsbord; привет мир; 你好 世界; こんにちは",
    " ".join(
        a + b + c for a in ("ka", "lo", "mi", "su", "te") for b in ("n", "r", "st", "") for c in ("a", "ing", "or")
    ),
)


def write_checkpoint(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: WeightsDtype = "bfloat16",
    shard_size: str | None = None,
    tokenizer: TokenizerKind | None = "byte_level",
    vocabulary_size: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
    evaluation: list[tuple[str, str]] | None = None,
    architecture: str = "LlamaForCausalLM",
    rare_tokens: range | None = None,
) -> Path:
    """Write a random checkpoint with its tokenizer into `folder` and return `folder`.

    `config` overrides fields of the architecture's config (2 layers, hidden 64, 4 heads, 2 key-value heads, context
    256, embeddings not tied).
    `shard_size` such as "50KB" splits the weights into several files with an index. `vocabulary_size` is the
    tokenizer's; the model has the same unless `config` says otherwise. `evaluation` holds (prompt, answer)
    pairs for `evaluation.jsonl`. `rare_tokens` are made so unlikely that no greedy text holds one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, vocabulary_size, chat_template)
    model = build_model(config, seed=seed, vocabulary_size=vocabulary_size, architecture=architecture)
    if rare_tokens is not None:
        with torch.no_grad():
            model.get_output_embeddings().weight[list(rare_tokens)] *= 0.05
    model = model.to(getattr(torch, dtype))
    if shard_size is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, max_shard_size=shard_size)
    if evaluation is not None:
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in evaluation]
        (folder / "evaluation.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def build_model(
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    vocabulary_size: int = 512,
    architecture: str = "LlamaForCausalLM",
) -> PreTrainedModel:
    """Return a float32 model with random weights, norms and biases, none of which a converter can fold away.

    Matrices are scaled to keep activations near unit variance, so that logits differ clearly and greedy
    decoding has few near-ties.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": SPECIAL_TOKENS.index(BOS_TOKEN),
        "eos_token_id": SPECIAL_TOKENS.index(EOS_TOKEN),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model_class = OWN_CLASSES.get(architecture) or getattr(transformers, architecture)
        config_class = model_class.config_class
        known = {*config_class().to_dict(), *config_class.attribute_map}
        common = {name: value for name, value in settings.items() if name in known}
        model = model_class(config_class(**{**common, **(config or {})}))
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            offset = 1.0 if architecture.startswith(_NORMS_FROM_ONE) else 0.0
            for name, parameter in model.named_parameters():
                _randomise(name, parameter, generator, offset)
            for name, buffer in model.named_buffers():
                if name.endswith("layer_scalar"):
                    buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _randomise(name: str, parameter: torch.Tensor, generator: torch.Generator, offset: float) -> None:
    """Fill one parameter in place: norms around one, biases around zero, matrices with unit gain.

    `offset` is what the model adds to the weights of its norms.
    """
    if parameter.ndim == 1 and name.endswith("weight"):
        parameter.uniform_(0.5 - offset, 1.5 - offset, generator=generator)
    elif parameter.ndim == 1:
        parameter.uniform_(-0.2, 0.2, generator=generator)
    elif any(each in name for each in _EMBEDDINGS):
        # Where embeddings are scaled up again, and tied, larger ones would only repeat the last token.
        parameter.normal_(0.0, 0.5 / (parameter.shape[1] ** 0.5 if offset else 1.0), generator=generator)
    else:
        inputs = parameter.shape[0] if name.endswith(_TRANSPOSED) else parameter.shape[1]
        parameter.normal_(0.0, 1.5 / inputs**0.5, generator=generator)


def write_tokenizer(
    folder: Path, kind: TokenizerKind, vocabulary_size: int = 512, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of exactly `vocabulary_size` tokens on a few fixed lines and write its files."""
    folder.mkdir(parents=True, exist_ok=True)
    train = {"byte_level": _train_byte_level, "unigram": _train_unigram}.get(kind, _train_metaspace)
    backend = train(vocabulary_size)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, SPECIAL_TOKENS.index(BOS_TOKEN))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(_build_sentencepiece(backend))
    return tokenizer


def _train_byte_level(vocabulary_size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=0,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return _require_size(backend, vocabulary_size)


def _train_metaspace(vocabulary_size: int) -> Tokenizer:
    """Train merges within words, then rebuild the model without a pre-tokenizer, as Llama 2 stores it."""
    trained = Tokenizer(models.BPE(unk_token=UNKNOWN_TOKEN, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=0,
        special_tokens=[*SPECIAL_TOKENS, *_BYTE_TOKENS],
        show_progress=False,
    )
    trained.train_from_iterator(_CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, unk_token=UNKNOWN_TOKEN, byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _require_size(backend, vocabulary_size)


def _train_unigram(vocabulary_size: int) -> Tokenizer:
    """Score the pieces that the corpus yields; the shortest of its substrings make up the number."""
    splitter = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = splitter
    trainer = trainers.UnigramTrainer(vocab_size=vocabulary_size, unk_token=UNKNOWN_TOKEN, show_progress=False)
    trained.train_from_iterator(_CORPUS, trainer)
    scores = dict.fromkeys([*SPECIAL_TOKENS, *_BYTE_TOKENS], 0.0)
    room = vocabulary_size - len(scores)
    pieces = sorted(json.loads(trained.to_str())["model"]["vocab"], key=lambda item: (-item[1], item[0]))
    scores.update([(piece, score) for piece, score in pieces if piece not in scores][:room])
    text = "▁".join(_CORPUS).replace(" ", "▁").replace("\n", "▁")
    for size in (2, 3, 4):
        for start in range(len(text) - size):
            if len(scores) < vocabulary_size:
                scores.setdefault(text[start : start + size], -20.0 - size)
    backend = Tokenizer(models.Unigram(list(scores.items()), SPECIAL_TOKENS.index(UNKNOWN_TOKEN), byte_fallback=True))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    return _require_size(backend, vocabulary_size)


def _require_size(backend: Tokenizer, vocabulary_size: int) -> Tokenizer:
    if backend.get_vocab_size() != vocabulary_size:
        raise ValueError(f"The corpus yields {backend.get_vocab_size()} tokens, not {vocabulary_size}.")
    return backend


def _build_sentencepiece(backend: Tokenizer) -> bytes:
    """Return the `tokenizer.model` of a metaspace tokenizer: equal ids, merge order as scores."""
    model = json.loads(backend.to_str())["model"]
    merged = [left + right for left, right in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, piece in enumerate(merged):
        ranks.setdefault(piece, rank)
    proto = sentencepiece_model_pb2.ModelProto()
    piece_types = proto.SentencePiece
    for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1]):
        kind = piece_types.NORMAL
        if token == UNKNOWN_TOKEN:
            kind = piece_types.UNKNOWN
        elif token in SPECIAL_TOKENS:
            kind = piece_types.CONTROL
        elif token in _BYTE_TOKENS:
            kind = piece_types.BYTE
        score = float(-ranks.get(token, len(merged))) if kind == piece_types.NORMAL else 0.0
        proto.pieces.add(piece=token, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id = SPECIAL_TOKENS.index(UNKNOWN_TOKEN)
    proto.trainer_spec.bos_id = SPECIAL_TOKENS.index(BOS_TOKEN)
    proto.trainer_spec.eos_id = SPECIAL_TOKENS.index(EOS_TOKEN)
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString(deterministic=True)
