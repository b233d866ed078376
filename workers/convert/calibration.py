"""Calibration: the ranges of what flows through a float graph, seen while it reads text as the runtime feeds it.

Owns how the graph is driven (prefill chunks and decode steps with their caches, positions and masks, by
`workers.verify.graph`) and how ranges are gathered. What it reads belongs to `calibration_text`. Called by
`workers.convert.quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ai_edge_quantizer import calibrator
from ai_edge_quantizer.utils import qsv_utils

from service.recipe_settings import DATA_ALGORITHMS
from workers.convert.calibration_text import CalibrationText
from workers.steps import Progress
from workers.verify.graph import Graph

#: Statistics of every tensor by name, as the quantizer takes them.
Statistics = dict[str, Any]

#: Tokens that `decode` is fed behind each window's chunks.
DECODED_TOKENS = 16
#: Tokens that the graph continues a prompt with.
CONTINUED_TOKENS = 8


class WatchedInterpreter:
    """An interpreter whose every run adds to the statistics; has what `Graph` needs of LiteRT's own.

    Ranges are the smallest and largest value ever seen: the tool's default, a moving average, would leave out the
    first token of a text, whose activations are the largest there are.
    """

    def __init__(self, path: Path, threads: int, settings: Sequence[Mapping[str, Any]]) -> None:
        self._settings = [dict(entry) for entry in settings]
        if any(entry["algorithm_key"] in DATA_ALGORITHMS for entry in settings):
            # These look at whole tensors and merge what they see in their own way.
            self._mode, options = calibrator.CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS, {}
        else:
            self._mode = calibrator.CalibrationMode.CALIBRATION_PROFILER_BASED
            options = {"qsv_update_func": qsv_utils.min_max_update}
        self._calibrator = calibrator.Calibrator(str(path), num_threads=threads, mode=self._mode, **options)

    def get_signature_list(self) -> Any:
        """Return the signatures' names."""
        return self._calibrator.get_signature_list()

    def get_signature_runner(self, name: str) -> Any:
        """Return what runs one signature."""
        return calibrator.CalibrationSignatureRunner(self._calibrator, name, self._mode, self._settings)

    def read_statistics(self) -> Statistics:
        """Return what was seen so far."""
        statistics: Statistics = self._calibrator.get_model_qsvs()
        return statistics


def calibrate(
    path: Path, settings: Sequence[Mapping[str, Any]], text: CalibrationText, progress: Progress
) -> tuple[Statistics, dict[str, Any]]:
    """Show a float graph the text, through every signature; returns statistics and figures.

    Padding is never shown: prefill is fed whole chunks alone, and `decode` the rest. Raises `VerificationFailed` when
    the graph does not run.
    """
    watched: list[WatchedInterpreter] = []

    def open_watched(graph_path: Path, threads: int) -> WatchedInterpreter:
        watched.append(WatchedInterpreter(graph_path, threads, settings))
        return watched[0]

    graph = Graph(path, open_interpreter=open_watched)
    fed = dict.fromkeys(graph.signatures, 0)
    rounds = [(length, window) for length in graph.prefill_lengths for window in text.windows]
    for number, (length, window) in enumerate(rounds):
        progress(f"Calibrating with chunks of {length} tokens", number / len(rounds))
        whole = max(length, (len(window) - DECODED_TOKENS) // length * length)
        graph.reset()
        graph.prefill(window[:whole], length)
        behind = window[whole : whole + DECODED_TOKENS]
        for position, token in enumerate(behind, start=whole):
            graph.decode(token, position)
        fed[graph.find_prefill(length)] += whole
        fed["decode"] += len(behind)
    progress("Calibrating decode", 1.0)
    for tokens in text.starts:
        graph.reset()
        for position, token in enumerate(tokens):
            graph.decode(token, position)
        fed["decode"] += len(tokens)
        if text.is_continued:
            room = min(CONTINUED_TOKENS, graph.context_length - len(tokens))
            fed["decode"] += len(graph.generate(tokens, room, text.stop_tokens).tokens)
    return watched[0].read_statistics(), {**text.figures, "tokens_by_signature": fed}
