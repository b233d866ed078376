"""Every case as a user would submit it: one job on a real kiln, with every step and every default gate.

Owns what is asked of a case and what of the answer is kept. Called by the tests of this folder and, for the families
that every run of the tests converts, by `tests/convert`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.recipes import RECIPES
from service.settings import Settings
from tests.families.cases import Case
from tests.kiln import Document, Kiln, fired_up
from workers.convert.architectures import FAMILIES
from workers.convert.architectures.as_built import AS_BUILT

CONTEXT_LENGTH = 128
PREFILL_LENGTHS = (16, 64)
#: Asked of every case.
RECIPES_OF_ALL = ("none", "dynamic_int8", "weight_only_int8", "dynamic_int4")
#: Asked of families that transformers alone describes, in two formats: what the exporter takes, recipes do not change.
RECIPES_OF_AS_BUILT = ("none", "dynamic_int8")
#: Cases that are asked for all other recipes too.
CASES_OF_ALL_RECIPES = ("llama-3.2", "gemma3")
#: Two conversions at a time, on as many cores; the rest as operators have it, for a test's kiln is impatient.
_SETTINGS = {
    "convert_slots": 2,
    "light_slots": 2,
    "benchmark_processes": 3,
    **{name: Settings.model_fields[name].default for name in ("lease_s", "heartbeat_s", "sweep_s", "cancel_poll_s")},
}


@dataclass(frozen=True)
class Outcome:
    """What became of one variant of a case: a recipe by an engine, in all formats."""

    case: Case
    engine: str
    recipe: str
    formats: tuple[str, ...]
    #: `succeeded` or `refused`; everything else is a failure.
    state: str
    #: Largest error of a logit over the range of logits, and the mean KL divergence in nats; None where not measured.
    error_ratio: float | None
    kl_mean: float | None
    #: The error of a variant that was not published.
    error: Mapping[str, Any] | None
    convert_s: float | None
    convert_peak_anon_bytes: int | None
    #: Of the `.litertlm`, if it was published.
    size_bytes: int | None
    #: Median tokens per second in the runtime, if they were measured.
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None

    @property
    def missed(self) -> list[Mapping[str, Any]]:
        """Verdicts of the gates that refused it."""
        return list((self.error or {}).get("details", {}).get("missed", []))

    def describe(self) -> str:
        """Return what a failing test shows."""
        return f"{self.case.name} {self.engine} {self.recipe}: {self.state}: {self.error}"


@contextmanager
def fired_for_families(folder: Path) -> Iterator[Kiln]:
    """Yield a running kiln that reads checkpoints below `folder / "models"`."""
    (folder / "models").mkdir(parents=True)
    with fired_up(folder / "kiln", folder / "models", **_SETTINGS) as kiln:
        yield kiln


def list_formats(case: Case) -> tuple[str, ...]:
    """Return the formats that the case's tokenizer can have: pieces with scores cannot be rebuilt as SentencePiece."""
    is_short = case.tokenizer == "unigram" or is_as_built(case)
    return ("tflite", "litertlm") if is_short else ("tflite", "litertlm", "task")


def is_as_built(case: Case) -> bool:
    """Return whether the case's family is read by `workers.convert.architectures.as_built`."""
    return case.architecture in {each.architecture for each in AS_BUILT}


def list_recipes(case: Case) -> list[tuple[str, ...]]:
    """Return the recipes of each job of a case; a recipe that not all are asked for has a job of its own."""
    if is_as_built(case):
        return [RECIPES_OF_AS_BUILT]
    others = [name for name in RECIPES if name not in RECIPES_OF_ALL] if case.name in CASES_OF_ALL_RECIPES else []
    return [RECIPES_OF_ALL, *((name,) for name in others)]


def submit(kiln: Kiln, checkpoint: Path, case: Case, recipes: tuple[str, ...], **fields: Any) -> str:
    """Submit one job for a case that was written to `checkpoint`; return its id."""
    asked: dict[str, Any] = {
        "engines": FAMILIES[case.architecture].engines,
        "recipes": recipes,
        "formats": list_formats(case),
        "context_length": CONTEXT_LENGTH,
        "prefill_lengths": PREFILL_LENGTHS,
        "ignore_custom_code": case.has_custom_code,
    }
    return kiln.submit(checkpoint, **{**asked, **fields})


def read_outcomes(case: Case, job: Document) -> list[Outcome]:
    """Return what became of each variant of a job."""
    outcomes = []
    for variant in job["variants"]:
        convert = next(
            (step for step in job["steps"] if step["kind"] == "convert" and variant["name"] in step["variants"]), {}
        )
        parity = variant["parity"] or {}
        sizes = [each["size_bytes"] for each in variant["artifacts"] if each["kind"] == "litertlm"]
        measured = next((each for each in variant["measurements"] if each["format"] == "litertlm"), {})
        speeds = [(measured.get(f"{name}_tokens_per_s") or {}).get("median") for name in ("prefill", "decode")]
        outcomes.append(
            Outcome(
                case=case,
                engine=variant["engine"],
                recipe=variant["recipe"],
                formats=list_formats(case),
                state=variant["state"],
                error_ratio=parity.get("max_abs_error_ratio"),
                kl_mean=parity.get("kl_mean"),
                error=variant["error"],
                convert_s=convert.get("duration_s"),
                convert_peak_anon_bytes=convert.get("peak_anon_bytes"),
                size_bytes=sizes[0] if sizes else None,
                prefill_tokens_per_s=speeds[0],
                decode_tokens_per_s=speeds[1],
            )
        )
    return outcomes
