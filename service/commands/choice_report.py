"""A comparison and a pick as people read them: tables, marks and reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.commands.output import format_failure, format_verdict, print_table, say
from service.comparison import ROUNDING_KL
from service.units import format_bytes


def print_comparison(document: Mapping[str, Any]) -> None:
    """Print a table for each format, then why variants did not succeed."""
    for front in document["formats"]:
        _print_front(front)
        print()
    _print_failures(document)
    _say_unfinished(document)


def _share(value: float) -> str:
    return f"{value:.1%}"


#: Figure -> heading and how it is printed, in the order of the columns.
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "size_bytes": ("size", format_bytes),
    "parity.kl_mean": ("KL", lambda kl: f"{kl:.2g}" if kl > ROUNDING_KL else "≤1e-6"),
    "parity.top1_agreement": ("top-1", _share),
    "quality.perplexity_increase": ("ppl", lambda share: f"{share:+.1%}"),
    "quality.exact_match": ("exact\nmatch", _share),
    "benchmark.decode_tokens_per_s": ("decode\ntok/s", lambda speed: f"{speed:,.0f}"),
    "benchmark.ttft_s": ("TTFT", lambda ttft_s: f"{ttft_s * 1000:,.0f} ms"),
    "benchmark.peak_anon_bytes": ("memory", format_bytes),
}


def _print_front(front: Mapping[str, Any]) -> None:
    """Print the artifacts of one format; columns that nobody has a figure for are left out."""
    candidates = front["candidates"]
    shown = [
        figure for figure in _COLUMNS if any(candidate["figures"].get(figure) is not None for candidate in candidates)
    ]
    headings = [_COLUMNS[figure][0] for figure in shown]
    rows = [
        [
            _mark(candidate),
            candidate["variant"],
            *(_cell(candidate, figure, front["best"].get(figure, ())) for figure in shown),
        ]
        for candidate in candidates
    ]
    print_table(("", front["format"], *headings), rows, right=headings)
    if front["axes"]:
        print(f"● not beaten in {_join(front['axes'])} at once   * best of its column   ~ noisy")
    published = [candidate for candidate in candidates if candidate["artifact"]]
    for name, variants in front["missing"].items():
        whom = "" if len(variants) == len(published) else f" for {', '.join(variants)}"
        print(f"{name} is not compared: not measured{whom}.")


def _mark(candidate: Mapping[str, Any]) -> str:
    if candidate["is_pareto"] is None:
        return "✗" if candidate["error"] else "…"
    return "●" if candidate["is_pareto"] else ""


def _cell(candidate: Mapping[str, Any], figure: str, best: Sequence[str]) -> str:
    value = candidate["figures"].get(figure)
    if value is None:
        return "- "
    is_noisy = figure.startswith("benchmark.") and candidate["measurement"] not in (None, "stable")
    return f"{'~' if is_noisy else ''}{_COLUMNS[figure][1](value)}{'*' if candidate['variant'] in best else ' '}"


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _print_failures(document: Mapping[str, Any]) -> None:
    """Print a line for every variant that did not succeed; its formats share it."""
    failures = {
        candidate["variant"]: format_failure(candidate["state"], candidate["error"])
        for front in document["formats"]
        for candidate in front["candidates"]
        if candidate["error"]
    }
    for variant, failure in failures.items():
        print(f"✗ {variant} {failure}")


def print_pick(document: Mapping[str, Any]) -> None:
    """Print the file's name on standard output, and say why it wins and what excluded the others."""
    picked, nearest = document["picked"], document["nearest"]
    if picked:
        print(picked["artifact"]["name"], flush=True)
        say(document["reason"])
        for verdict in picked["constraints"]:
            say(f"  {format_verdict(verdict)}")
    elif nearest:
        say(f"None fits. The nearest is {nearest['variant']!r}: {_say_objections(nearest)}")
    else:
        say(document["reason"])
    for judged in document["excluded"]:
        if judged != nearest:
            say(f"✗ {judged['variant']} {_say_objections(judged)}")
    _say_unfinished(document)


def _say_objections(judged: Mapping[str, Any]) -> str:
    """Return why an artifact cannot be picked; a refusal's own figures stand for the bounds that it misses too."""
    if judged["artifact"] is None:
        return format_failure(judged["state"], judged["error"]) if judged["error"] else str(judged["state"])
    missed = [verdict for verdict in judged["constraints"] if not verdict["passed"]]
    sentences = {verdict["sentence"] for verdict in missed}
    others = [objection for objection in judged["objections"] if objection not in sentences]
    return "; ".join([*map(format_verdict, missed), *others])


def _say_unfinished(document: Mapping[str, Any]) -> None:
    if not document["is_final"]:
        say(f"Job {document['job_id']} is {document['state']}: more may come.")
