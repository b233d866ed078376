"""The audit of dependencies, with the real pip-audit against a service on the loopback."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.kiln import ROOT
from tests.services import free_port

#: What the service knows: one vulnerable package.
FINDING = {
    "id": "GHSA-kiln-kiln-kiln",
    "aliases": ["CVE-2026-99999"],
    "summary": "It burns.",
    "affected": [
        {
            "package": {"name": "clay", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}],
        }
    ],
}


class Osv(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"vulns": [FINDING]} if query["package"]["name"] == "clay" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def osv() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()
        thread.join()


def audit(folder: Path, url: str, accepted: str = "", lock: str = "clay==1.0\nsand==1.0\n") -> tuple[int, str]:
    (folder / "lock").write_text(lock)
    (folder / "accepted.toml").write_text(accepted)
    program = [sys.executable, str(ROOT / ".ci" / "audit.py"), "--osv-url", url]
    arguments = ["--accepted", str(folder / "accepted.toml"), "--lock", str(folder / "lock")]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, env={"HOME": str(folder)})
    return done.returncode, done.stdout + done.stderr


def accept(until: dt.date, name: str = "CVE-2026-99999", reason: str = "Nothing burns here.") -> str:
    return f'[[accepted]]\nid = "{name}"\npackage = "clay"\nreason = "{reason}"\nuntil = {until}\n'


TOMORROW = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=1)
YESTERDAY = TOMORROW - dt.timedelta(days=2)


def test_a_finding_fails_until_it_is_accepted_with_reason_and_date(tmp_path: Path, osv: str) -> None:
    code, said = audit(tmp_path, osv)
    assert code == 1
    assert "clay 1.0: CVE-2026-99999, GHSA-kiln-kiln-kiln; fixed in 2.0" in said
    code, said = audit(tmp_path, osv, accept(TOMORROW))
    assert (code, "accepted: clay 1.0" in said) == (0, True)
    assert audit(tmp_path, osv, accept(TOMORROW, name="CVE-2026-1"))[0] == 1, "another one is not this one"


def test_packages_without_findings_pass(tmp_path: Path, osv: str) -> None:
    code, said = audit(tmp_path, osv, lock="sand==1.0\n")
    assert (code, "No known vulnerability" in said) == (0, True)


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [("", 0), (accept(TOMORROW), 0), (accept(YESTERDAY), 1), (accept(TOMORROW, reason=" "), 1)],
    ids=["nothing", "for now", "run out", "no reason"],
)
def test_without_a_service_it_says_so_and_still_looks_at_the_accepted(
    tmp_path: Path, accepted: str, expected: int
) -> None:
    code, said = audit(tmp_path, f"http://127.0.0.1:{free_port()}/", accepted)
    assert code == expected
    assert "NOT audited" in said


def test_the_file_of_the_accepted_is_in_order() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "audit.py"), "--osv-url", f"http://127.0.0.1:{free_port()}/"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
