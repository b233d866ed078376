"""Graphs that templates give are the files of full conversions; `tests/families` shows it for every family."""

from __future__ import annotations

import json
from pathlib import Path

from tests.convert.conftest import CONTEXT_LENGTH, PREFILL_LENGTHS, Workshop, ignore
from workers.convert import template, template_write
from workers.convert.template_compare import require_same_bytes


def test_a_template_made_of_random_weights_gives_the_graph_of_a_checkpoint(workshop: Workshop, tmp_path: Path) -> None:
    made, written = tmp_path / "template", tmp_path / "written"
    made.mkdir()
    written.mkdir()
    params = {
        "engine": workshop.figures["engine"],
        "prefill_lengths": list(PREFILL_LENGTHS),
        "context_length": CONTEXT_LENGTH,
    }
    # Nothing of the checkpoint but its config; the comparison below is the proof.
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text((workshop.checkpoint / "config.json").read_text())
    figures = template.run({**params, "is_proven": False}, {"config": config}, made, ignore)
    assert sorted(path.name for path in made.iterdir()) == ["skeleton.bin", "template.json"]
    assert figures["unused_tensors"] == []
    inputs = {"template": made, "checkpoint": workshop.checkpoint}
    figures = template_write.run(params, inputs, written, ignore)
    require_same_bytes(written / "model.tflite", workshop.convert / "model.tflite")
    assert json.loads(json.dumps(figures))["size_bytes"] == workshop.figures["size_bytes"]
