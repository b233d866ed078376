"""The checkpoint's own tokenizer, opened with transformers and held to its `tokenizer.json`.

Must not open a model. Called by `workers.verify.source` and, for calibration, by `workers.convert.calibration_text`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from workers.verify import openelm

openelm.register()

#: Parts of a `tokenizer.json` that decide how a text becomes pieces and pieces a text.
_SPLITTING = ("normalizer", "pre_tokenizer", "decoder")


def open_tokenizer(checkpoint: Path) -> tuple[Any, tuple[str, ...]]:
    """Open it from local files, without remote code; return it and the parts that `restore_splitting` names."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    return tokenizer, restore_splitting(tokenizer, checkpoint / "tokenizer.json")


def restore_splitting(tokenizer: Any, file: Path) -> tuple[str, ...]:
    """Let the tokenizer split texts as `tokenizer.json` says; returns which parts transformers had replaced.

    For some architectures transformers 5.23 (`AutoTokenizer`) puts its own class's normalizer and splitting in the
    place of the file's, whatever class the checkpoint names; Qwen 2 is one. Bundles and every other reader of the file
    follow the file, and so must the source that they are held against.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not file.is_file():
        return ()
    stated = Tokenizer.from_file(str(file))
    parts = json.loads(stated.to_str()), json.loads(backend.to_str())
    replaced = tuple(part for part in _SPLITTING if parts[0].get(part) != parts[1].get(part))
    for part in replaced:
        setattr(backend, part, getattr(stated, part))
    return replaced
