"""A small Hugging Face Hub on the loopback, for the real client.

Owns repositories in memory and the part of the Hub's HTTP interface that reading them takes: repository
information with file sizes and LFS digests, resolve addresses with `ETag`, `X-Repo-Commit`, `X-Linked-Size` and
`Range`, private repositories behind a token, and faults on demand. Called by tests of every folder that may open
sockets; run by hand: `python -m tests.hub_server FOLDER` serves FOLDER as `tests/checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.http_threads import QuietHandler, bind, serving

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_STORE = re.compile(r"/store/(?P<repo>[^/]+/[^/]+)/(?P<commit>[0-9a-f]{40})/(?P<name>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
#: Files of these suffixes are stored as on the real Hub: in LFS, with a stated SHA-256, behind a redirect.
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".model")


@dataclass
class Repository:
    """Files by commit, branches by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    #: Tokens that may read it; None makes it public.
    tokens: set[str] | None = None
    is_gated: bool = False

    def find_commit(self, revision: str) -> str | None:
        """Return the commit that a branch or a commit names."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision)


@dataclass
class Faults:
    """What goes wrong; tests set and reset the fields."""

    #: A body of a file breaks off after this many bytes of each response.
    cut_after_bytes: int | None = None
    #: This many next requests whose path contains `fail_path` are answered with `fail_status`.
    fail_count: int = 0
    fail_status: int = 500
    fail_path: str = ""
    #: The bytes of files with these names are served inverted.
    wrong_bytes: set[str] = field(default_factory=set)
    #: Bodies are followed by this many more bytes than stated by the repository's information.
    extra_bytes: int = 0
    ignores_ranges: bool = False
    #: Error bodies and messages repeat the request's Authorization header, as a hostile server may.
    echoes_credentials: bool = False
    #: Where LFS files are redirected to instead of this server's own store.
    redirect_to: str | None = None


@dataclass(frozen=True)
class Request:
    """One request that the server saw."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class HubServer:
    """The server's state; `endpoint` is what `HF_ENDPOINT` should say."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self._http = bind(_Handler, hub=self)
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def add_commit(self, repo: str, files: dict[str, bytes], branch: str = "main", **settings: Any) -> str:
        """Commit `files` to a branch of `repo` (made if it is new; `settings` are fields of `Repository`)."""
        repository = self.repositories.setdefault(repo, Repository(**settings))
        listing = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        commit = hashlib.sha1(json.dumps([repo, branch, listing]).encode(), usedforsecurity=False).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def add_folder(self, repo: str, folder: Path, branch: str = "main", **settings: Any) -> str:
        """Commit the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.add_commit(repo, files, branch, **settings)

    def serving(self) -> AbstractContextManager[None]:
        """Answer while the block runs."""
        return serving(self._http)


@contextmanager
def run_hub() -> Iterator[HubServer]:
    """Run a hub in a thread of this process."""
    hub = HubServer()
    with hub.serving():
        yield hub


class _Handler(QuietHandler):
    """One connection."""

    hub: HubServer

    def answer(self) -> None:
        """Answer as the repositories and the faults say."""
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), authorization))
            faults = self.hub.faults
            fails = faults.fail_count > 0 and faults.fail_path in path
            faults.fail_count -= fails
        if fails:
            self._refuse(faults.fail_status, None, "the hub has a bad day")
        elif match := _INFO.fullmatch(path):
            self._describe(match["repo"], match["revision"])
        elif match := _STORE.fullmatch(path):
            self._send_file(match["repo"], match["commit"], match["name"])
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match["repo"], match["revision"], match["name"])
        else:
            self._refuse(404, None, "no such page")

    def _find(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        """Return the repository and commit if the request may see them; else answer and return None."""
        repository = self.hub.repositories.get(repo)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repository.is_gated and token not in (repository.tokens or set()):
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif repository.tokens is not None and token not in repository.tokens:
            self._refuse(401, None, "Invalid username or password.")
        elif (commit := repository.find_commit(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository, commit
        return None

    def _describe(self, repo: str, revision: str | None) -> None:
        found = self._find(repo, revision or "main")
        if found is None:
            return
        repository, commit = found
        siblings = [_describe_file(name, data) for name, data in sorted(repository.commits[commit].items())]
        document = {"_id": "0" * 24, "id": repo, "modelId": repo, "sha": commit, "private": False, "tags": []}
        self._send_json(200, {**document, "downloads": 0, "likes": 0, "siblings": siblings})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        repository, commit = found
        data = repository.commits[commit].get(name)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif name.endswith(_LFS_SUFFIXES):
            target = self.hub.faults.redirect_to or f"{self.hub.endpoint}/store/{repo}/{commit}"
            headers = _identify(name, data, commit) | {"Location": f"{target}/{name}", "Content-Length": "0"}
            self._send(302, headers, b"")
        else:
            self._send_file(repo, commit, name)

    def _send_file(self, repo: str, commit: str, name: str) -> None:
        faults = self.hub.faults
        stated = self.hub.repositories[repo].commits[commit][name]
        data = bytes(255 - byte for byte in stated) if name in faults.wrong_bytes else stated
        data += b"\x00" * faults.extra_bytes
        headers = _identify(name, stated, commit) | {"Accept-Ranges": "bytes"}
        status, start = 200, 0
        asked = _RANGE.fullmatch(self.headers.get("Range") or "")
        if asked and not faults.ignores_ranges:
            start = int(asked[1])
            if start >= len(data):
                self._send(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}, b"")
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        headers["Content-Length"] = str(len(body))
        if faults.cut_after_bytes is not None and faults.cut_after_bytes < len(body):
            body = body[: faults.cut_after_bytes]
            self.close_connection = True
        self._send(status, headers, body)

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        if self.hub.faults.echoes_credentials:
            message = f"{message} {self.headers.get('Authorization')}"
        headers = {"X-Error-Message": message, "X-HF-Warning": f"{message}; {message}"}
        headers |= {"X-Error-Code": code} if code else {}
        self._send_json(status, {"error": message}, headers)

    def _send_json(self, status: int, document: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        stated = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._send(status, stated | (headers or {}), body)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(body)
        except ConnectionError:
            # The client has read enough, or was killed: both are what tests are about.
            self.close_connection = True


def _describe_file(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\x00" % len(data) + data, usedforsecurity=False).hexdigest()
    described: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
    if name.endswith(_LFS_SUFFIXES):
        described["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return described


def _identify(name: str, data: bytes, commit: str) -> dict[str, str]:
    described = _describe_file(name, data)
    tag = described["lfs"]["sha256"] if "lfs" in described else described["blobId"]
    headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit}
    if "lfs" in described:
        headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))}
    return headers


if __name__ == "__main__":
    with run_hub() as server:
        server.add_folder("tests/checkpoint", Path(sys.argv[1]))
        print(f"HF_ENDPOINT={server.endpoint}  repository tests/checkpoint; Ctrl-C stops it", flush=True)
        threading.Event().wait()
