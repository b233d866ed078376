"""`edgekiln gc`: gives disk back by hand; the beat does the same every ten minutes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands import options
from service.commands.output import print_json, print_table, say
from service.units import format_bytes

if TYPE_CHECKING:
    from service.settings import Settings
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
    """Remove what is kept no longer: jobs, unused files, uploads that no job names.

    The settings EDGEKILN_KEEP_... say how long. Safe beside a running server. A blob is condemned first, and deleted by
    a later run, when whatever was being uploaded meanwhile has ended.
    """
    from service.ledger import database
    from service.storage import open_configured_store
    from service.sweep import read_retention, sweep_store

    settings = options.read_settings(data_dir=data_dir)
    database.migrate(settings.ledger_url)
    ledger = database.Database(settings.ledger_url)
    try:
        findings = list(
            sweep_store(
                ledger,
                open_configured_store(settings),
                read_retention(settings),
                dry_run=dry_run,
            )
        )
    finally:
        ledger.close()
    findings += _trim_cache(settings, dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "findings": [vars(finding) for finding in findings], **_add_up(findings)})
        return
    _print(findings, dry_run)


def _trim_cache(settings: Settings, dry_run: bool) -> list[Finding]:
    """Do for this host's cache what its workers do."""
    from service.host_cache import trim_cache
    from service.sweep import Finding

    trimmed = trim_cache(
        settings.cache_dir, max_bytes=settings.max_cache_bytes, keep_s=settings.keep_cache_s, dry_run=dry_run
    )
    return [Finding("deleted", item.kind, item.path.name, item.size_bytes, why) for item, why in trimmed]


def _add_up(findings: list[Finding]) -> dict[str, Any]:
    """Return jobs that go, bytes by fate, and bytes by fate and kind."""
    sizes: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {fate: Counter() for fate in ("deleted", "condemned", "missing")}
    for finding in findings:
        if finding.fate != "removed":
            sizes[finding.fate] += finding.size_bytes
            by_kind[finding.fate][finding.kind] += finding.size_bytes
    return {
        "removed_jobs": sum(finding.fate == "removed" for finding in findings),
        **{f"{fate}_bytes": sizes[fate] for fate in by_kind},
        "bytes_by_kind": {fate: dict(sorted(kinds.items())) for fate, kinds in by_kind.items()},
    }


def _print(findings: list[Finding], dry_run: bool) -> None:
    counts: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for finding in findings:
        counts[finding.fate, finding.kind, finding.why] += 1
        sizes[finding.fate, finding.kind, finding.why] += finding.size_bytes
    rows = [[*key, str(count), format_bytes(sizes[key])] for key, count in counts.items()]
    print_table(("what", "kind", "why", "number", "size"), rows, right=("number", "size"))
    freed = format_bytes(_add_up(findings)["deleted_bytes"])
    say(f"{freed} would be freed; nothing was changed." if dry_run else f"{freed} freed.")
