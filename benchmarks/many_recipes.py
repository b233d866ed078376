"""One checkpoint, N recipes: EdgeKiln against N runs of the bare exporter.

Owns the claim that one float conversion and a quantize step per recipe is cheaper than an export per recipe. Both
contenders write one `.litertlm` per recipe from the same checkpoint with equal prefill lengths and context, in the same
run of this script, and the result is a ratio: EdgeKiln's wall time over N times the median of the bare runs. EdgeKiln's
time includes starting its services, fetching, verifying and publishing, which the exporter does not do.

    python benchmarks/many_recipes.py --shape example --json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured_command import CommandError, Measured, measure, say

EXAMPLE_DIR = Path(__file__).parents[1] / "examples" / "addition"

#: EdgeKiln's recipes and the exporter's name for the same; the exporter knows no float16.
BARE_RECIPES = {
    "none": "none",
    "dynamic_int8": "dynamic_wi8_afp32",
    "weight_only_int8": "weight_only_wi8_afp32",
    "dynamic_int4": "dynamic_wi4_afp32",
    "weight_only_int4": "weight_only_wi4_afp32",
}
#: The exporter's own command, where TensorFlow is not installed: it names one generated module of it.
BARE_EXPORTER = """
import runpy
from workers.convert.toolfixes import schema_without_tensorflow
with schema_without_tensorflow():
    runpy.run_module("litert_torch.generative.export_hf", run_name="__main__", alter_sys=True)
"""
DEFAULT_RECIPES = ("none", "dynamic_int8", "dynamic_int4")

#: Prefill length and context of each shape.
LENGTHS = {"example": (64, 128), "smollm135m": (128, 1280)}

#: huggingface.co/HuggingFaceTB/SmolLM-135M, config.json; the tokenizer is the example's.
SMOLLM_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def write_checkpoint(folder: Path) -> None:
    """Write a checkpoint of SmolLM-135M's shape: seeded random weights in bfloat16, norms that are not ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    example = json.loads((EXAMPLE_DIR / "config.json").read_text())
    tokens = {name: example[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in example}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM_135M, **tokens))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Norms of ones would be folded away by the converter.
                parameter.uniform_(0.5, 1.5)
            elif "embed_tokens" not in name:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (EXAMPLE_DIR / name).is_file():
            shutil.copy(EXAMPLE_DIR / name, folder)


def run_bare(checkpoint: Path, recipe: str, lengths: tuple[int, int], work_dir: Path) -> Measured:
    """Run the exporter once in a process of its own."""
    output_dir = work_dir / "bare"
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [
        *(sys.executable, "-c", BARE_EXPORTER, str(checkpoint), str(output_dir)),
        f"--prefill_lengths=[{lengths[0]}]",
        f"--cache_length={lengths[1]}",
        f"--quantization_recipe={BARE_RECIPES[recipe]}",
        "--bundle_litert_lm=True",
    ]
    measured = measure(command, work_dir / "bare.log")
    # The exporter may end with 0 and without a file.
    if not (output_dir / "model.litertlm").is_file():
        raise CommandError(f"{' '.join(command)} wrote no model.litertlm.")
    return measured


def run_edgekiln(
    command: Sequence[str],
    checkpoint: Path,
    recipes: Sequence[str],
    lengths: tuple[int, int],
    engine: str,
    work_dir: Path,
) -> tuple[Measured, dict[str, Any]]:
    """Run `edgekiln convert` once in a fresh data directory; return its cost and the job."""
    for folder in ("data", "out"):
        shutil.rmtree(work_dir / folder, ignore_errors=True)
    measured = measure(
        [
            *(*command, "convert", str(checkpoint), "-o", str(work_dir / "out"), "--engine", engine, "--json"),
            *("--format", "litertlm", "--prefill", str(lengths[0]), "--context", str(lengths[1])),
            *(word for recipe in recipes for word in ("--recipe", recipe)),
        ],
        work_dir / "edgekiln.log",
        {"EDGEKILN_DATA_DIR": str(work_dir / "data")},
        # 1: some variant did not succeed. A gate may refuse one with random weights; the work was done all the same.
        statuses=(0, 1),
    )
    try:
        job: dict[str, Any] = json.loads(measured.stdout)
        variants = job["variants"]
    except (ValueError, KeyError) as error:
        log = (work_dir / "edgekiln.log").read_text(errors="replace")[-2000:]
        raise CommandError(f"edgekiln convert printed no job:\n{log}") from error
    unfinished = [variant for variant in variants if variant["state"] not in ("succeeded", "refused")]
    if unfinished or len(variants) != len(recipes):
        raise CommandError(f"Not every variant was made, so there is nothing to compare: {json.dumps(variants)[:2000]}")
    return measured, job


def compare(arguments: argparse.Namespace, checkpoint: Path, work_dir: Path) -> dict[str, Any]:
    """Run both contenders, bare runs before and after EdgeKiln's, and return the figures."""
    recipes: list[str] = arguments.recipe or list(DEFAULT_RECIPES)
    lengths = LENGTHS[arguments.shape]
    bare: list[dict[str, Any]] = []

    def export(count: int) -> None:
        for _ in range(count):
            recipe = recipes[len(bare) % len(recipes)]
            say(f"bare exporter, {recipe} ({len(bare) + 1} of {arguments.bare_runs})")
            bare.append({"recipe": recipe, **run_bare(checkpoint, recipe, lengths, work_dir).to_json()})

    # Around the other contender, so that a host that slows down or speeds up favours neither.
    export((arguments.bare_runs + 1) // 2)
    edgekiln = None
    if not arguments.bare_only:
        say(f"edgekiln convert, {len(recipes)} recipes")
        command = [arguments.edgekiln or str(Path(sys.executable).with_name("edgekiln"))]
        measured, job = run_edgekiln(command, checkpoint, recipes, lengths, arguments.engine, work_dir)
        edgekiln = {
            **measured.to_json(),
            "variants": [{key: variant[key] for key in ("name", "state")} for variant in job["variants"]],
            "steps": [{key: step[key] for key in ("kind", "duration_s", "peak_anon_bytes")} for step in job["steps"]],
        }
    export(arguments.bare_runs // 2)
    median_s = statistics.median(run["wall_s"] for run in bare)
    return {
        "shape": arguments.shape,
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "prefill_length": lengths[0],
        "context_length": lengths[1],
        "engine": arguments.engine,
        "recipes": recipes,
        "host": {
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "bare": {"runs": bare, "median_wall_s": median_s, "times_recipes_wall_s": median_s * len(recipes)},
        "edgekiln": edgekiln,
        "ratio": None if edgekiln is None else edgekiln["wall_s"] / (median_s * len(recipes)),
    }


def describe(result: dict[str, Any]) -> str:
    """Return the figures as a few lines for people."""
    bare, edgekiln, count = result["bare"], result["edgekiln"], len(result["recipes"])
    lines = [
        f"{result['shape']}: {count} recipes ({', '.join(result['recipes'])}), prefill {result['prefill_length']}, "
        f"context {result['context_length']}",
        f"bare exporter  {bare['median_wall_s']:7.1f} s a recipe (median of {len(bare['runs'])}), "
        f"{bare['times_recipes_wall_s']:7.1f} s for {count}; {_describe_memory(bare['runs'])}",
    ]
    if edgekiln is not None:
        lines += [
            f"edgekiln       {edgekiln['wall_s']:7.1f} s for {count}, engine {result['engine']}; "
            f"{_describe_memory([edgekiln])}",
            f"ratio          {result['ratio']:7.2f} (below 1: EdgeKiln is faster)",
        ]
    return "\n".join(lines)


def _describe_memory(runs: Sequence[dict[str, Any]]) -> str:
    gib = 1 << 30
    anon = [run["peak_anon_bytes"] for run in runs]
    text = "not readable" if None in anon else f"{max(anon) / gib:.2f} GiB"
    return f"largest process {max(run['peak_rss_bytes'] for run in runs) / gib:.2f} GiB, anonymous in all {text}"


def main() -> int:
    """Compare and print; the exit code is 1 when a contender fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(LENGTHS), default="example", help="which checkpoint")
    parser.add_argument("--recipe", action="append", choices=sorted(BARE_RECIPES), help="repeatable; default: three")
    parser.add_argument(
        "--engine", choices=("traced", "reauthored", "auto"), default="traced", help="EdgeKiln's engine"
    )
    parser.add_argument("--bare-runs", type=int, default=3, metavar="N", help="runs of the bare exporter (3)")
    parser.add_argument("--bare-only", action="store_true", help="leave EdgeKiln out")
    parser.add_argument("--edgekiln", metavar="PATH", help="the command; default: the one beside this Python")
    parser.add_argument("--work-dir", type=Path, help="where to put files and logs; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.bare_runs < 1:
        parser.error("--bare-runs must be at least 1")
    if arguments.work_dir is not None:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="many-recipes-", dir=arguments.work_dir) as name:
        checkpoint = EXAMPLE_DIR
        if arguments.shape != "example":
            checkpoint = Path(name) / "checkpoint"
            say(f"writing a checkpoint of shape {arguments.shape}")
            write_checkpoint(checkpoint)
        try:
            result = compare(arguments, checkpoint, Path(name))
        except CommandError as error:
            say(str(error))
            return 1
    print(json.dumps(result, indent=2) if arguments.json else describe(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
