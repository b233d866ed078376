"""Every family by every engine: what a template gives is, byte for byte, what a full conversion gives.

`make test-templates`: two conversions a case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.cases import CASES, Case
from workers.convert import convert, template
from workers.convert.architectures import FAMILIES
from workers.convert.template_checkpoint import write_checkpoint

CONVERSIONS = [
    pytest.param(case, engine, id=f"{case.name}-{engine}")
    for case in CASES
    if case.is_converted
    for engine in FAMILIES[case.architecture].engines
]
LENGTHS: dict[str, Any] = {"prefill_lengths": [16], "context_length": 64}


def ignore(_message: str, _fraction: float | None = None) -> None:
    """Take progress and say nothing."""


@pytest.mark.parametrize(("case", "engine"), CONVERSIONS)
def test_a_template_gives_the_graph_of_a_checkpoint(case: Case, engine: str, tmp_path: Path) -> None:
    checkpoint = case.write(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    params = {"engine": engine, **LENGTHS}
    folders = [tmp_path / name for name in ("made", "converted", "template")]
    for folder in folders:
        folder.mkdir()
    random = write_checkpoint(config, tmp_path / "random", seed=1)
    for weights, folder in zip((random, checkpoint), folders, strict=False):
        convert.run(params, {"checkpoint": weights}, folder, ignore)
    made = template.make_template(config, params, random, folders[0] / "model.tflite", folders[2])
    # With other weights, whatever else depends on them, and whatever has no place, would differ.
    converted = folders[1] / "model.tflite"
    template.prove_template(made, folders[2], config, checkpoint, converted, tmp_path / "written.tflite")
