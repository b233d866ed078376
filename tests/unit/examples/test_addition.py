"""The shipped addition checkpoint is whole, small, right, and what its script writes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from examples.addition_data import (
    BOS,
    EOS,
    IGNORED,
    OPERAND_LIMIT,
    TOKEN_IDS,
    VOCABULARY,
    make_batch,
    split_pairs,
    write_answer,
    write_prompt,
)
from examples.addition_folder import write_checkpoint, write_evaluation
from examples.train_addition import build_model, measure_accuracy, train

FOLDER = Path(__file__).parents[3] / "examples" / "addition"
FILES = {
    "README.md",
    "config.json",
    "evaluation.jsonl",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
SIZE_LIMIT_BYTES = 5_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "model.safetensors")


def test_folder_holds_the_standard_files_and_stays_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= SIZE_LIMIT_BYTES


def test_weights_are_bfloat16_finite_and_of_the_promised_number(weights: dict[str, torch.Tensor]) -> None:
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert 1_000_000 <= sum(tensor.numel() for tensor in weights.values()) <= 4_000_000


def test_norms_are_trained(weights: dict[str, torch.Tensor]) -> None:
    norms = {name: tensor.float() for name, tensor in weights.items() if "norm" in name}
    assert len(norms) == 7
    for name, tensor in norms.items():
        assert tensor.std() > 0.01, name


def test_files_beside_the_weights_are_those_the_script_writes(tmp_path: Path) -> None:
    write_checkpoint(build_model(), tmp_path)
    write_evaluation(split_pairs().held_out, tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == FILES - {"README.md"}
    for name in written - {"model.safetensors"}:
        assert (FOLDER / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8"), name


def test_evaluation_prompts_are_held_out_in_both_orders() -> None:
    split = split_pairs()
    trained = {write_prompt(pair) for pair in split.training}
    lines = [json.loads(line) for line in (FOLDER / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 200 <= len({line["prompt"] for line in lines}) == len(lines) <= 300
    for line in lines:
        first, second = map(int, line["prompt"].removesuffix("=").split("+"))
        assert line == {"prompt": f"{first}+{second}=", "answer": str(first + second)}
        assert {f"{first}+{second}=", f"{second}+{first}="}.isdisjoint(trained)


def test_split_covers_every_pair_once_but_the_mirrored_ones_held_out() -> None:
    split = split_pairs()
    held_out = {frozenset(pair) for pair in split.held_out}
    expected = {
        (first, second)
        for first in range(OPERAND_LIMIT)
        for second in range(OPERAND_LIMIT)
        if frozenset((first, second)) not in held_out
    }
    assert len(split.training) == len(expected)
    assert set(split.training) == expected
    assert split_pairs(seed=1).held_out != split.held_out


def test_tokenizer_gives_one_token_a_character_after_the_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == len(VOCABULARY)
    assert tokenizer("12+7=").input_ids == [TOKEN_IDS[token] for token in (BOS, "1", "2", "+", "7", "=")]
    text = "The sum of 12 and 7\n\tis 19."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_chat_template_writes_text_and_typed_parts_alike(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = "<s><|user|>1+1=</s><|assistant|>2</s><|user|>12+7=</s><|assistant|>"
    turns = [("user", "1+1="), ("assistant", "2"), ("user", "12+7=")]
    plain = [{"role": role, "content": text} for role, text in turns]
    typed = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    for messages in (plain, typed):
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    "prefix",
    ["<s>", "", "<s><s>", "<s><|user|>1+1=</s><|assistant|>2</s><|user|>"],
    ids=["bos", "no_bos", "double_bos", "second_turn"],
)
@pytest.mark.parametrize(("prompt", "answer"), [("12+7=", "19"), ("99+99=", "198"), ("0+0=", "0"), ("58+64=", "122")])
def test_answers_however_the_prompt_begins(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prefix: str, prompt: str, answer: str
) -> None:
    suffix = "</s><|assistant|>" if "<|user|>" in prefix else ""
    inputs = tokenizer(prefix + prompt + suffix, add_special_tokens=False, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :]) == answer + EOS


@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_held_out_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    assert measure_accuracy(model, tokenizer, split_pairs().held_out, chat=chat) >= 0.97


def test_untrained_model_answers_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    assert measure_accuracy(build_model(), tokenizer, split_pairs().held_out[:50], chat=False) == 0


@pytest.mark.parametrize("turn_count", [1, 3])
def test_batches_ask_for_right_answers_of_given_pairs_only(turn_count: int) -> None:
    pairs = [(12, 7), (90, 25)]
    inputs, targets = make_batch(random.Random(0), pairs, answer_count=96, turn_count=turn_count)
    assert inputs.shape == targets.shape
    assert inputs.shape[0] == 96 // turn_count
    answers = {write_answer(pair) for pair in pairs}
    for row in targets.tolist():
        learned = "".join(VOCABULARY[token_id] for token_id in row if token_id != IGNORED)
        *written, rest = learned.split(EOS)
        assert rest == ""
        assert len(written) == turn_count
        assert set(written) <= answers


def test_training_moves_every_layer_and_norm() -> None:
    torch.manual_seed(0)
    model = build_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, [(12, 7), (30, 40)], steps=2, answer_count=4, seed=0)
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []
