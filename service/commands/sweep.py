"""`edgekiln gc`: gives disk back by hand; the beat does the same every ten minutes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands import options
from service.commands.output import print_json, print_table, say
from service.units import format_bytes

if TYPE_CHECKING:
    from service.sweep import Finding

GC_EPILOG = """Examples:

\b
  edgekiln gc --dry-run
  EDGEKILN_KEEP_INTERMEDIATES_S=0 edgekiln gc --json
"""


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go; change nothing.")] = False,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove intermediate files that nobody has used for long.

    Safe beside a running server. A blob is condemned first, and deleted by a later run, when whatever was being
    uploaded meanwhile has ended.
    """
    from service.ledger import database
    from service.storage import open_configured_store
    from service.sweep import sweep_store

    settings = options.read_settings(data_dir=data_dir)
    database.migrate(settings.ledger_url)
    ledger = database.Database(settings.ledger_url)
    try:
        findings = list(
            sweep_store(
                ledger,
                open_configured_store(settings),
                keep_s=settings.keep_intermediates_s,
                wait_s=settings.condemned_s,
                dry_run=dry_run,
            )
        )
    finally:
        ledger.close()
    if as_json:
        print_json({"dry_run": dry_run, "findings": [vars(finding) for finding in findings], **_add_up(findings)})
        return
    _print(findings, dry_run)


def _add_up(findings: list[Finding]) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for finding in findings:
        sizes[finding.fate] += finding.size_bytes
    return {f"{fate}_bytes": sizes[fate] for fate in ("deleted", "condemned", "missing")}


def _print(findings: list[Finding], dry_run: bool) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        counts[finding.fate, finding.why] += 1
        sizes[finding.fate, finding.why] += finding.size_bytes
    rows = [[fate, why, str(count), format_bytes(sizes[fate, why])] for (fate, why), count in counts.items()]
    print_table(("what", "why", "blobs", "size"), rows, right=("blobs", "size"))
    freed = format_bytes(_add_up(findings)["deleted_bytes"])
    say(f"{freed} would be freed; nothing was changed." if dry_run else f"{freed} freed.")
