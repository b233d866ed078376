"""The engine `traced`: litert-torch's automatic exporter of transformers models, float.

Owns the exporter's settings and nothing of any architecture. Writes a float32 graph; never quantizes or bundles.
Called by `workers.convert.convert`.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from workers.convert import side_by_side, toolfixes

# Importing the exporter makes transformers print on standard output, which belongs to a step's figures.
with toolfixes.schema_without_tensorflow(), contextlib.redirect_stdout(sys.stderr):
    from litert_torch.generative.export_hf import export


def convert(checkpoint_dir: Path, prefill_lengths: list[int], context_length: int, output_dir: Path) -> Path:
    """Write the float32 graph with one `prefill_N` signature a length and `decode`; return its path.

    The exporter reads the folder through transformers and works in memory: about 3.3 times the float32 weights.
    Inputs, outputs, KV layout and mask are those of the engine `reauthored`.
    """
    toolfixes.accept_experts_of_gemma4()
    with (
        toolfixes.sparse_activations_kept(),
        toolfixes.convolutions_begun_anew(),
        side_by_side.signatures_side_by_side(),
    ):
        export.export(
            model=str(checkpoint_dir),
            output_dir=str(output_dir),
            # Otherwise it writes into a folder with a random name.
            keep_temporary_files=True,
            trust_remote_code=False,
            prefill_lengths=list(prefill_lengths),
            cache_length=context_length,
            # The exporter's own default would quantize.
            quantization_recipe="none",
            externalize_embedder=False,
            bundle_litert_lm=False,
        )
    return output_dir / "model.tflite"
