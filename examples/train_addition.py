"""Trains the addition example and writes its whole folder.

Owns the model's shape, the training and the measuring. Run by hand, from the repository's root:

    python -m examples.train_addition --help
    python -m examples.train_addition --output-dir examples/addition
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from examples.addition_data import (
    BOS,
    EOS,
    IGNORED,
    OPERAND_LIMIT,
    PAD,
    TOKEN_IDS,
    VOCABULARY,
    Pair,
    Split,
    make_batch,
    split_pairs,
    write_answer,
    write_prompt,
)
from examples.addition_folder import ROPE_THETA, write_checkpoint, write_evaluation, write_model_card

DEFAULT_OUTPUT_DIR = Path(__file__).parent / "addition"

#: Muon's rate for matrices, AdamW's for embeddings and norms; both follow the same schedule.
MATRIX_LEARNING_RATE = 0.01
OTHER_LEARNING_RATE = 0.003

#: Every n-th batch holds conversations of several turns instead of single questions.
CONVERSATION_INTERVAL = 4
CONVERSATION_TURN_COUNTS = (2, 3, 4)


def build_model() -> LlamaForCausalLM:
    """Return the untrained model, float32."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[PAD],
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, pairs: list[Pair], steps: int, answer_count: int, seed: int) -> None:
    """Train in place for `steps` batches of `answer_count` answers; the loss counts answers only."""
    generator = random.Random(f"addition training {seed}")
    optimizers = _build_optimizers(model)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _scale_rate(step, steps)) for optimizer in optimizers
    ]
    model.train()
    started_at = time.monotonic()
    for step in range(1, steps + 1):
        turn_count = 1 if step % CONVERSATION_INTERVAL else generator.choice(CONVERSATION_TURN_COUNTS)
        inputs, targets = make_batch(generator, pairs, answer_count, turn_count)
        loss = _measure_loss(model, inputs, targets)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.5f}  {time.monotonic() - started_at:.0f} s", flush=True)
    model.train(False)


def measure_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, chat: bool
) -> float:
    """Return the share of `pairs` answered exactly, greedily, up to the end token; in [0, 1]."""
    right_count = 0
    for start in range(0, len(pairs), 500):
        chunk = pairs[start : start + 500]
        prompts = [_render_chat(tokenizer, pair) if chat else write_prompt(pair) for pair in chunk]
        encoded = tokenizer(
            prompts, add_special_tokens=not chat, return_tensors="pt", padding=True, padding_side="left"
        )
        # No longer answer than three digits and the end token is right, so no more are generated.
        generated = model.generate(**encoded, max_new_tokens=4, do_sample=False)
        texts = tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :])
        for pair, text in zip(chunk, texts, strict=True):
            answer, end, _ = text.partition(EOS)
            right_count += end == EOS and answer == write_answer(pair)
    return right_count / len(pairs)


def write_folder(model: LlamaForCausalLM, split: Split, steps: int, answer_count: int, folder: Path) -> dict[str, str]:
    """Write everything into `folder`, measure what was written, and return the measured shares as text."""
    write_checkpoint(model, folder)
    write_evaluation(split.held_out, folder)
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    all_pairs = [(first, second) for first in range(OPERAND_LIMIT) for second in range(OPERAND_LIMIT)]
    accuracy = {
        "held_out_raw": f"{measure_accuracy(stored, tokenizer, split.held_out, chat=False):.2%}",
        "held_out_chat": f"{measure_accuracy(stored, tokenizer, split.held_out, chat=True):.2%}",
        "all_raw": f"{measure_accuracy(stored, tokenizer, all_pairs, chat=False):.2%}",
    }
    settings = {"steps": str(steps), "answers": str(answer_count), "held_out_count": str(len(split.held_out))}
    write_model_card(stored, accuracy | settings, folder)
    return accuracy


def main(argv: list[str] | None = None) -> None:
    """Train, write and print the accuracy."""
    parser = argparse.ArgumentParser(
        description="Train a small Llama model that adds two numbers from 0 to 99, and write its checkpoint folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-o", "--output-dir", type=Path, default=DEFAULT_OUTPUT_DIR, help="folder to write")
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=256, help="answers learned from in one step")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and training order; never of the split")
    parser.add_argument("--threads", type=int, default=1, help="processor threads; the count changes roundings")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    split = split_pairs()
    model = build_model()
    train(model, split.training, arguments.steps, arguments.batch, arguments.seed)
    accuracy = write_folder(model, split, arguments.steps, arguments.batch, arguments.output_dir)
    for name, share in accuracy.items():
        print(f"{name}: {share}")


def _build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return [
        # After 250 steps AdamW alone answers 12 % of held-out prompts, with Muon 94 %.
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _scale_rate(step: int, steps: int) -> float:
    """Return the factor of the learning rates: a short rise, a plateau, a straight fall to almost zero."""
    progress = step / steps
    return min(1.0, (step + 1) / 50, max(0.01, (1.0 - progress) / 0.6))


def _measure_loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    learned = targets != IGNORED
    # The output layer runs only where something is learned.
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[learned]
    return functional.cross_entropy(model.lm_head(hidden), targets[learned])


def _render_chat(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> str:
    messages = [{"role": "user", "content": write_prompt(pair)}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


if __name__ == "__main__":
    main()
