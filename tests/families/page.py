"""`docs/supported.md`: written from a whole run of this folder, and read to know whether it is stale.

Owns the page's form, and what it must agree with: the rows that the table of families and the cases demand, the
digests of code and the versions of tools that decide the figures. Called by the tests of this folder, which write it,
and by `tests/unit/test_supported.py`, which compares it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from service.recipes import RECIPES
from tests.families.cases import CASES, Case
from tests.families.conversion import (
    CASES_OF_ALL_RECIPES,
    CONTEXT_LENGTH,
    PREFILL_LENGTHS,
    RECIPES_OF_ALL,
    Outcome,
    list_formats,
)
from workers.catalog import read_toolchain
from workers.convert.architectures import FAMILIES, UNCONVERTIBLE

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "supported.md"

#: Steps whose code decides what the page says.
STEPS = ("reference", "convert", "quantize", "bundle", "verify")
#: Files that decide the rest: what is asked, and how it is judged.
_FILES = {
    "checkpoints": ("tests/checkpoints.py", "tests/families/cases.py", "tests/families/conversion.py"),
    "recipes and gates": ("service/recipes.py", "service/recipe_settings.py", "service/gates.py"),
}

_INTRODUCTION = f"""# Supported

Written by `make test-families`; do not edit. Each row is a small checkpoint with random weights, converted, quantized,
bundled, run in LiteRT-LM and judged by the default gates as any job is (context {CONTEXT_LENGTH}, prefill
{" and ".join(map(str, PREFILL_LENGTHS))}). [Families](families.md) says what each architecture's config may hold,
[below](#checkpoints) stands what each checkpoint is made of.

A variant is published in all its formats or in none. For `none` its cell shows the largest error of a logit over
the range of logits, for other recipes the mean KL divergence from the source in nats. *Refused* names what missed a
default gate. Few bits leave little of small random matrices ([decision 5](decisions/0005-default-gates.md)), so a
refusal here is about these weights, not about the model. `-` was not asked for.

## Families
"""

Key = tuple[str, str, str]
#: Heading and rows.
Table = tuple[list[str], list[list[str]]]


def render_page(outcomes: Sequence[Outcome], measured: Sequence[Outcome]) -> str:
    """Return the page of a whole run; `measured` are the float variants with their speeds."""
    found = {(each.case.name, each.engine, each.recipe): each for each in outcomes}
    refused = [[f"`{name}`", reason] for name, reason in UNCONVERTIBLE.items()]
    parts = [
        _INTRODUCTION,
        write_table(*tabulate_families(found)),
        "## Every recipe\n",
        write_table(*tabulate_recipes(found)),
        _BOTH_ENGINES,
        write_table(*tabulate_engines(measured)),
        "## Checkpoints\n",
        write_table(*tabulate_cases()),
        "## What is refused\n",
        write_table(["architecture", "why"], refused),
        _MADE_WITH,
        write_table(["what", "version or digest"], [list(item) for item in read_state().items()]),
    ]
    return "\n".join(parts)


def tabulate_families(found: Mapping[Key, Outcome]) -> Table:
    """Return every case by every engine; the models are named once."""
    heading = ["models", "checkpoint", "engine", *(f"`{name}`" for name in RECIPES_OF_ALL)]
    rows, named = [], ""
    for case, engine in list_rows():
        models = FAMILIES[case.architecture].models
        cells = [describe_outcome(found.get((case.name, engine, recipe))) for recipe in RECIPES_OF_ALL]
        rows.append(["" if models == named else models, f"`{case.name}`", f"`{engine}`", *cells])
        named = models
    return heading, rows


def tabulate_cases() -> Table:
    """Return what each case is made of."""
    cases = {case.name: case for case, _ in list_rows()}
    rows = [
        [f"`{name}`", f"`{case.architecture}`", case.describe(), ", ".join(list_formats(case))]
        for name, case in cases.items()
    ]
    return ["checkpoint", "architecture", "what it has", "formats"], rows


_BOTH_ENGINES = """## Both engines

The float variant of every family that both engines convert; `auto` takes the first of each pair. Speeds are medians in
LiteRT-LM on the host that ran the tests; at these sizes they show overhead, not arithmetic.
"""

_MADE_WITH = """## Made with

A test compares these with the code: where they differ, this page is stale.
"""


def describe_outcome(outcome: Outcome | None) -> str:
    """Return one cell."""
    if outcome is None:
        return "-"
    if outcome.state == "succeeded":
        if RECIPES[outcome.recipe].is_lossy:
            return f"KL {round_figure(outcome.kl_mean)}"
        return round_figure(outcome.error_ratio)
    if outcome.missed:
        misses = "; ".join(
            f"{each['figure_name'].partition('.')[2]} {round_figure(each['figure'])}, not {each['threshold']:g}"
            for each in outcome.missed
        )
        return f"refused: {misses}"
    return f"not offered: {(outcome.error or {}).get('code', outcome.state)}"


def round_figure(value: float | None) -> str:
    """Return two digits, or a power of ten where only the size says something."""
    if value is None:
        return "-"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:.2g}"


def tabulate_recipes(found: Mapping[Key, Outcome]) -> Table:
    """Return heading and rows of the cases that are asked for everything."""
    columns = [(case, engine) for case, engine in list_rows() if case.name in CASES_OF_ALL_RECIPES]
    heading = ["recipe", *(f"`{case.name}`, `{engine}`" for case, engine in columns)]
    rows = [
        [f"`{recipe}`", *(describe_outcome(found.get((case.name, engine, recipe))) for case, engine in columns)]
        for recipe in RECIPES
    ]
    return heading, rows


def tabulate_engines(measured: Iterable[Outcome]) -> Table:
    """Return heading and rows of the comparison of engines."""
    heading = ["checkpoint", "engine", "error / range", "conversion", "peak memory", "`.litertlm`"]
    heading += ["prefill tok/s", "decode tok/s"]
    rows = [
        [
            f"`{each.case.name}`",
            f"`{each.engine}`",
            round_figure(each.error_ratio),
            f"{each.convert_s or 0:.0f} s",
            f"{(each.convert_peak_anon_bytes or 0) / 2**20:.0f} MiB",
            f"{(each.size_bytes or 0) / 1000:.0f} kB",
            f"{each.prefill_tokens_per_s or 0:,.0f}",
            f"{each.decode_tokens_per_s or 0:,.0f}",
        ]
        for each in measured
    ]
    return heading, rows


def write_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def list_rows() -> list[tuple[Case, str]]:
    """Return the cases and engines that the page must have a row for, in order of the table of families."""
    order = list(FAMILIES)
    cases = sorted((case for case in CASES if case.is_converted), key=lambda case: order.index(case.architecture))
    return [(case, engine) for case in cases for engine in FAMILIES[case.architecture].engines]


def read_state() -> dict[str, str]:
    """Return what decides the figures as it is now: versions of tools and digests of code, in short."""
    toolchain = read_toolchain()
    # The build for CPUs and the one for GPUs are one version here.
    state = {name: version.partition("+")[0] for name, version in toolchain.versions.items()}
    state |= {f"step `{kind}`": toolchain.revisions[kind][:16] for kind in STEPS}
    for what, names in _FILES.items():
        content = b"".join((ROOT / name).read_bytes() for name in names)
        state[what] = hashlib.sha256(content).hexdigest()[:16]
    return state


def read_page(text: str) -> tuple[list[tuple[str, str]], list[str], dict[str, str]]:
    """Return the page's rows (case, engine), its recipes, and what it was made with."""
    families = text.partition("## Families")[2].partition("## Every")[0]
    rows = re.findall(r"^\| [^|]*\| `([\w.-]+)` \| `(\w+)` \|", families, re.MULTILINE)
    recipes = re.findall(r"^\| `(\w+)` \|", text.partition("## Every recipe")[2].partition("## Both")[0], re.MULTILINE)
    made = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text.partition("## Made with")[2], re.MULTILINE)
    return rows, recipes, {name: value for name, value in made if name not in ("what", "---")}
