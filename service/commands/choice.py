"""`edgekiln compare` and `edgekiln pick`: a job's artifacts beside each other, and which one to take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from service.choice import DEFAULT_PREFERENCE, Wish
from service.commands import options
from service.commands.choice_report import print_comparison, print_pick
from service.commands.output import print_json, say
from service.commands.reader import ask
from service.comparison import AXES
from service.errors import InvalidRequest
from service.units import parse_bytes

COMPARE_EPILOG = """Examples:

\b
  edgekiln compare job_1f0c9a2b3c4d5e6f
  edgekiln compare job_1f0c9a2b3c4d5e6f --format litertlm --plot comparison.svg
  edgekiln compare job_1f0c9a2b3c4d5e6f --data-dir ./data
"""
PICK_EPILOG = """Examples:

\b
  edgekiln pick job_1f0c9a2b3c4d5e6f --max-size 1GB --min-top1 0.95
  edgekiln pick job_1f0c9a2b3c4d5e6f --prefer speed --max-kl 0.05 --max-memory 2GiB
  edgekiln run out/$(edgekiln pick job_1f0c9a2b3c4d5e6f --max-size 2MB) "12+7="
"""

Document = dict[str, Any]

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Read the jobs of this directory, whether it is served or not."),
]
OneFormat = Annotated[str | None, typer.Option("--format", "-f", metavar="F", help="Only artifacts of this format.")]


MaxSize = Annotated[str | None, typer.Option("--max-size", metavar="SIZE", help="Largest file, e.g. 1GB or 512MiB.")]
MinTop1 = Annotated[
    float | None, typer.Option("--min-top1", metavar="SHARE", help="Least top-1 agreement with the source, 0 to 1.")
]
MaxKl = Annotated[
    float | None, typer.Option("--max-kl", metavar="NATS", help="Most mean KL divergence from the source.")
]
MaxPerplexityIncrease = Annotated[
    float | None,
    typer.Option("--max-perplexity-increase", metavar="SHARE", help="Most increase of perplexity over the source's."),
]
MinExactMatch = Annotated[
    float | None, typer.Option("--min-exact-match", metavar="SHARE", help="Least exact match on the evaluation.")
]
MinDecode = Annotated[float | None, typer.Option("--min-decode-tokens-per-s", metavar="N", help="Least decode speed.")]
MaxTtft = Annotated[float | None, typer.Option("--max-ttft-s", metavar="S", help="Longest time to first token.")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Most anonymous memory while it runs.")
]


def compare(
    job_id: options.JobId,
    format: OneFormat = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw the comparison of one format too.")
    ] = None,
    data_dir: DataDir = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Compare a job's artifacts.

    In quality, size, speed and memory: which ones no other beats in all of these, and which are best at each.
    """
    if plot is not None and plot.suffix != ".svg":
        raise InvalidRequest(f"--plot {plot}: the picture is an SVG; name a file that ends in .svg.")
    document = ask(url, api_key, data_dir, lambda jobs: jobs.compare(job_id))
    if format is not None:
        made = [front["format"] for front in document["formats"]]
        if format not in made:
            raise InvalidRequest(f"The job makes {', '.join(made) or 'nothing yet'}; not {format}.")
        document["formats"] = [front for front in document["formats"] if front["format"] == format]
    if plot is not None:
        _plot(document, plot)
    if as_json:
        print_json(document)
        return
    print_comparison(document)


def _plot(document: Mapping[str, Any], file: Path) -> None:
    """Draw the first format."""
    from service.commands.plot import draw_front

    front = document["formats"][0]
    file.write_text(draw_front(front, f"{document['job_id']}: {front['format']}"), encoding="utf-8")
    say(f"{file} shows {front['format']}.")


def pick(
    job_id: options.JobId,
    max_size: MaxSize = None,
    min_top1: MinTop1 = None,
    max_kl: MaxKl = None,
    max_perplexity_increase: MaxPerplexityIncrease = None,
    min_exact_match: MinExactMatch = None,
    min_decode_tokens_per_s: MinDecode = None,
    max_ttft_s: MaxTtft = None,
    max_memory: MaxMemory = None,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", metavar="NAME=VALUE", help="Any other gate as a bound; may be repeated."),
    ] = None,
    format: OneFormat = None,
    engine: Annotated[str | None, typer.Option("--engine", metavar="E", help="Only artifacts of this engine.")] = None,
    prefer: Annotated[
        str, typer.Option("--prefer", metavar="AXIS", help=f"What decides among those that fit: {', '.join(AXES)}.")
    ] = DEFAULT_PREFERENCE,
    data_dir: DataDir = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Pick the best artifact of a job.

    Prints the name of its file; standard error says why. Exits with 1 when none fits.
    """
    bounds = {
        "max_size_bytes": None if max_size is None else float(parse_bytes(max_size)),
        "min_top1": min_top1,
        "max_kl": max_kl,
        "max_perplexity_increase": max_perplexity_increase,
        "min_exact_match": min_exact_match,
        "min_decode_tokens_per_s": min_decode_tokens_per_s,
        "max_ttft_s": max_ttft_s,
        "max_peak_anon_bytes": None if max_memory is None else float(parse_bytes(max_memory)),
        **options.parse_gates(gate or []),
    }
    given = {name: value for name, value in bounds.items() if value is not None}
    # What cannot work is refused before anybody is asked.
    Wish(given, prefer, format, engine)
    document = ask(
        url,
        api_key,
        data_dir,
        lambda jobs: jobs.pick(job_id, prefer=prefer, format=format, engine=engine, **given),
    )
    if as_json:
        print_json(document)
    else:
        print_pick(document)
    if document["picked"] is None:
        raise typer.Exit(1)
