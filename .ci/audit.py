"""`make check`: the pinned dependencies against known vulnerabilities.

pip-audit asks osv.dev about every package of requirements.lock. A finding fails, unless
`.ci/accepted-vulnerabilities.toml` accepts it with a reason, until a date. Where osv.dev cannot be reached this says so
and passes: a laptop on a train can still be worked on, and nobody takes silence for an audit.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OSV_URL = "https://api.osv.dev/v1/query"
ACCEPTED = ROOT / ".ci" / "accepted-vulnerabilities.toml"
LOCK = ROOT / "requirements.lock"
_PROBE_S = 3.0
_FIELDS = {"id", "package", "reason", "until"}
#: pip-audit ends with 1 for findings as well as for its own errors.
_FOUND = 1


def read_accepted(path: Path, today: dt.date) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return (package, id) -> reason of what is accepted today, and what is wrong with the file."""
    accepted, complaints = {}, []
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("accepted", []):
        name = f"{entry.get('package', '?')} {entry.get('id', '?')}"
        if entry.keys() != _FIELDS or not str(entry["reason"]).strip() or not isinstance(entry["until"], dt.date):
            complaints.append(f"{path.name}: {name}: needs {', '.join(sorted(_FIELDS))}, and a date for `until`.")
        elif entry["until"] < today:
            complaints.append(f"{path.name}: {name}: accepted until {entry['until']}; look at it again.")
        else:
            accepted[entry["package"].lower(), entry["id"]] = str(entry["reason"])
    return accepted, complaints


def can_be_reached(url: str) -> str | None:
    """Return why the service cannot be asked; None when it answers as it should."""
    query = json.dumps({"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "25.0"}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=query), timeout=_PROBE_S) as answer:
            json.load(answer)
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return None


def find_vulnerabilities(url: str, lock: Path) -> list[dict[str, Any]]:
    """Return every known vulnerability of the pinned packages: `package`, `version`, `id`, `aliases`, `fixed_in`."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--osv-url", url, "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, _FOUND) or not done.stdout.strip():
        raise RuntimeError(done.stderr.strip() or f"pip-audit ended with {done.returncode}")
    return [
        {
            "package": package["name"].lower(),
            "version": package["version"],
            "id": found["id"],
            "aliases": found["aliases"],
            "fixed_in": found["fix_versions"],
        }
        for package in json.loads(done.stdout)["dependencies"]
        for found in package.get("vulns", [])
    ]


def main(argv: list[str] | None = None) -> int:
    """Audit; return the exit code."""
    parser = argparse.ArgumentParser(description="Look for known vulnerabilities of the pinned dependencies.")
    parser.add_argument("--osv-url", default=OSV_URL)
    parser.add_argument("--accepted", type=Path, default=ACCEPTED)
    parser.add_argument("--lock", type=Path, default=LOCK)
    arguments = parser.parse_args(argv)
    accepted, complaints = read_accepted(arguments.accepted, dt.datetime.now(dt.UTC).date())
    reason = can_be_reached(arguments.osv_url)
    if reason is None:
        for found in find_vulnerabilities(arguments.osv_url, arguments.lock):
            names = {found["id"], *found["aliases"]}
            what = f"{found['package']} {found['version']}: {', '.join(sorted(names))}"
            reasons = [accepted[found["package"], name] for name in names if (found["package"], name) in accepted]
            if reasons:
                print(f"accepted: {what}: {reasons[0]}")
            else:
                complaints.append(f"{what}; fixed in {', '.join(found['fixed_in']) or 'no version yet'}")
    print(*complaints, sep="\n", end="\n" if complaints else "")
    if reason is not None:
        print(f"Dependencies were NOT audited: {arguments.osv_url} cannot be asked ({reason}).")
    elif not complaints:
        print("No known vulnerability in the pinned dependencies, but for what is accepted.")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
