"""`docs/supported.md` is of this code: `make test-families` writes it anew where it is not."""

from __future__ import annotations

from service.recipes import RECIPES
from tests.families.cases import CASES
from tests.families.page import PAGE, list_rows, read_page, read_state
from workers.convert.architectures import FAMILIES, UNCONVERTIBLE

STALE = "docs/supported.md is stale: run `make test-families`"


def test_the_page_is_of_this_code() -> None:
    rows, recipes, made_with = read_page(PAGE.read_text(encoding="utf-8"))
    assert rows == [(case.name, engine) for case, engine in list_rows()], STALE
    assert recipes == list(RECIPES), STALE
    assert made_with == read_state(), STALE


def test_the_page_names_what_is_refused() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text and reason in text for name, reason in UNCONVERTIBLE.items()), STALE


def test_a_change_would_be_seen() -> None:
    """Control: the comparison is not blind."""
    text = PAGE.read_text(encoding="utf-8")
    state = read_state()
    line = f"| step `convert` | {state['step `convert`']} |"
    assert read_page(text.replace(line, line.replace(state["step `convert`"], "0" * 16)))[2] != state
    row = next(line for line in text.splitlines() if "| `llama-3.2` | " in line and "`traced`" in line)
    assert len(read_page(text.replace(row + "\n", ""))[0]) == len(list_rows()) - 1


def test_every_family_is_converted() -> None:
    assert {case.architecture for case in CASES if case.is_converted} == set(FAMILIES)
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_kind_of_checkpoint_is_converted() -> None:
    converted = [case for case in CASES if case.is_converted]
    configs = [case.config for case in converted]
    assert {case.dtype for case in converted} == {"bfloat16", "float16", "float32"}
    assert {case.tokenizer for case in converted} == {"byte_level", "metaspace", "sentencepiece", "unigram"}
    assert any(case.shard_size for case in converted)
    assert any(case.has_custom_code for case in converted)
    assert {config.get("tie_word_embeddings", False) for config in configs} == {True, False}
    assert any(config.get("num_key_value_heads") == 1 for config in configs)
    assert any(config.get("head_dim") == 32 for config in configs)
    assert any(config.get("partial_rotary_factor", 1) < 1 for config in configs)
    assert any(config.get("attention_bias") and config.get("mlp_bias") for config in configs)
    assert any(config.get("sliding_window") for config in configs)
