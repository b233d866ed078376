"""The step `template`: a graph without weights, from a `config.json` alone; also runs by hand.

Owns the making: a checkpoint of random weights is converted the long way, each of its tensors is found in the graph,
and what was found is proven by a second checkpoint, which must come out byte for byte as the long way writes it. Called
by `python -m workers.convert.template`.

    python -m workers.convert.template --input config=DIR -o OUT \\
        --params '{"engine": "reauthored", "prefill_lengths": [128], "context_length": 1280}'
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.errors import TemplateUnfit
from workers.convert import convert, template_checkpoint
from workers.convert.template_compare import require_same_bytes
from workers.convert.template_files import Template, describe_graph, save_template
from workers.convert.template_graph import mapped
from workers.convert.template_map import find_places
from workers.convert.template_tensors import MappedTensors
from workers.convert.template_write import write_graph
from workers.steps import Progress, run_by_hand

#: Seeds of the checkpoint that a template is made from, and of the one that proves it.
_MAKING_SEED, _PROVING_SEED = 1, 2


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write a template of the `config.json` in `inputs["config"]`; see `workers.steps`.

    `params` are those of `convert`, and `is_proven`: whether a second conversion proves the template, true by default.
    Without it nothing shows that a constant of the graph is the same for all weights, so that every tensor must have
    its place. Raises `TemplateUnfit`, naming what is not explained, and what `convert` raises.
    """
    config = json.loads((inputs["config"] / "config.json").read_text(encoding="utf-8"))
    is_proven = bool(params.get("is_proven", True))
    with tempfile.TemporaryDirectory(dir=output_dir, prefix="template-") as scratch:
        progress("Converting random weights", 0.0)
        checkpoint, graph = _convert(config, params, Path(scratch) / "made", _MAKING_SEED, progress)
        progress("Finding tensors in the graph", 0.5)
        template = make_template(config, params, checkpoint, graph, output_dir)
        _require_placed(template, is_proven)
        # The larger half of the disk that this takes.
        shutil.rmtree(Path(scratch) / "made")
        if is_proven:
            progress("Converting other random weights", 0.55)
            checkpoint, graph = _convert(config, params, Path(scratch) / "proof", _PROVING_SEED, progress)
            progress("Comparing", 0.95)
            prove_template(template, output_dir, config, checkpoint, graph, Path(scratch) / "written.tflite")
    return {
        "engine": params["engine"],
        "tensors": len(template.tensors),
        "unused_tensors": list(template.unused),
        "pieces": len(template.pieces),
        "graph_bytes": template.size_bytes,
        "skeleton_bytes": (output_dir / "skeleton.bin").stat().st_size,
        "is_proven": is_proven,
    }


def make_template(
    config: Mapping[str, Any], params: Mapping[str, Any], checkpoint_dir: Path, graph_path: Path, output_dir: Path
) -> Template:
    """Write the template of a graph and the random checkpoint it was made from into `output_dir`; return it."""
    lengths = [int(length) for length in params["prefill_lengths"]]
    graph = describe_graph(config, params["engine"], lengths, int(params["context_length"]))
    with MappedTensors(checkpoint_dir) as tensors, mapped(graph_path) as content:
        places = find_places(content, tensors)
        extents = {name: tensor.extents for name, tensor in tensors.items()}
        return save_template(output_dir, content, graph, extents, places.unplaced, places.pieces)


def prove_template(
    template: Template,
    template_dir: Path,
    config: Mapping[str, Any],
    checkpoint_dir: Path,
    graph_path: Path,
    scratch_path: Path,
) -> None:
    """Raise `TemplateUnfit` unless the template gives a checkpoint's graph as the long way gave it.

    With other weights in both, whatever else depends on weights differs, and is named.
    """
    write_graph(template, template_dir, config, checkpoint_dir, scratch_path, _ignore)
    require_same_bytes(scratch_path, graph_path)


def _convert(
    config: Mapping[str, Any], params: Mapping[str, Any], folder: Path, seed: int, progress: Progress
) -> tuple[Path, Path]:
    """Return a random checkpoint and its graph."""
    checkpoint = template_checkpoint.write_checkpoint(config, folder / "checkpoint", seed)
    output = folder / "convert"
    output.mkdir()
    convert.run(params, {"checkpoint": checkpoint}, output, lambda message, _=None: progress(message))
    return checkpoint, output / convert.MODEL_FILE


def _require_placed(template: Template, is_proven: bool) -> None:
    if template.unused and not is_proven:
        raise TemplateUnfit(
            f"{len(template.unused)} tensors stand nowhere in the graph: {', '.join(template.unused[:5])}. Whether it "
            "depends on them only a proof shows.",
            tensors=list(template.unused[:20]),
        )


def _ignore(message: str, fraction: float | None = None) -> None:
    """Take progress and say nothing."""


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Make a template of a config.json: a graph without weights."))
