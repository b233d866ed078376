"""A checkpoint in a repository of a Hugging Face Hub.

Owns how a repository's revision becomes a commit and how its needed files are downloaded, resumed and checked.
The token travels in request headers only: no file, message, log or exception chain holds it. Which endpoint a
request may name is the service's decision. Called through `workers.fetch.sources.open_source`.

`huggingface_hub.hf_hub_download` is not used: since 2.x it deletes a partial file when a download fails
(huggingface_hub PR 4228) and it reads a body of any length. Its session, headers, addresses and errors are.
What the hub redirects to elsewhere is `workers.fetch.web_client`'s to judge and to open.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_raise_for_status
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from service.checkpoint_files import SourceFile, choose_needed
from service.errors import (
    CheckpointInvalid,
    EdgeKilnError,
    InvalidRequest,
    InvalidSettings,
    SourceChanged,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
)
from service.web_addresses import HostRules, read_place
from workers.fetch.download import Body, download_all
from workers.fetch.http_body import interruptible, read_body, write_range
from workers.fetch.sources import ByteProgress, FetchedFile, Pinned
from workers.fetch.web_client import MAX_REDIRECTS, TIMEOUT_S, WebClient
from workers.steps import Progress

# The client logs warnings in the server's words, which may repeat what the request carried.
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REVISION = re.compile(r"[A-Za-z0-9._/\-+]{1,255}")
#: What a header can carry; also keeps an odd token out of the HTTP library's own messages.
_CREDENTIAL = re.compile(r"[\x21-\x7e]{1,1024}")


class HubSource:
    """A Hub repository; its revision is a commit."""

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        endpoint: str | None = None,
        credential: str | None = None,
        cache_dir: Path | None = None,
        rules: HostRules | None = None,
    ) -> None:
        if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
            raise InvalidRequest(f"{repo!r} is not a repository name; write it as 'organisation/name'.")
        if revision is not None and not _REVISION.fullmatch(revision):
            raise InvalidRequest(f"{revision!r} is not a revision; name a branch, a tag or a commit.")
        if credential is not None and not _CREDENTIAL.fullmatch(credential):
            raise InvalidRequest("The hub token holds characters that no token has; check it for spaces or line ends.")
        self._repo = repo
        self._revision = revision
        self._endpoint = _read_endpoint(endpoint)
        if credential is not None and not _is_private_way(self._endpoint):
            raise InvalidSettings(
                f"The hub token would travel to {self._endpoint} in the clear; name an https endpoint, or set no token."
            )
        self._credential = credential
        self._cache_dir = cache_dir
        #: For redirects that leave the hub.
        self._rules = rules or HostRules()

    def pin(self, progress: Progress) -> Pinned:
        """Resolve the revision (the default branch if there is none) to a commit and list its needed files."""
        progress(f"asking {self._endpoint} for {self._repo}")
        commit, files = self._list_needed()
        source = {"kind": "hub", "repo": self._repo, "revision": commit, "endpoint": self._endpoint}
        return Pinned(source, files)

    def bring(self, output_dir: Path, progress: Progress) -> list[FetchedFile]:
        """Download the needed files of the pinned commit; partial files stay in the cache folder on failure."""
        if self._revision is None or not _COMMIT.fullmatch(self._revision):
            raise InvalidRequest("A repository must be pinned to a commit by the resolve step before it is fetched.")
        commit, files = self._list_needed()
        if commit != self._revision:
            raise SourceChanged(
                f"The hub answers commit {commit} for {self._revision} of {self._repo}; submit the job again.",
                pinned_revision=self._revision,
                found_revision=commit,
            )
        count = ByteProgress(progress, "downloading", sum(file.size_bytes for file in files))

        @contextmanager
        def open_range(file: SourceFile, start: int, end: int | None) -> Iterator[Body]:
            headers = {**self._headers(), **write_range(start, end)}
            with interruptible(), _open(web, self._rules, self._address(file, commit), headers) as response:
                yield read_body(response, file, start)

        with self._report_errors(), WebClient(self._rules) as web:
            return download_all(files, open_range, self._cache_dir, output_dir, count)

    def _list_needed(self) -> tuple[str, list[SourceFile]]:
        """Return the commit and the needed files with what the hub states about them."""
        with self._report_errors():
            try:
                info = HfApi(endpoint=self._endpoint, token=self._credential or False).model_info(
                    self._repo, revision=self._revision, files_metadata=True, timeout=TIMEOUT_S
                )
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if isinstance(error, httpx2.HTTPError):
                    raise
                raise SourceUnavailable(
                    f"{self._endpoint} does not answer as a hub does; check the endpoint."
                ) from None
        if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
            raise SourceUnavailable(f"{self._endpoint} states no commit for {self._repo}; check the endpoint.")
        return info.sha, choose_needed(_read_siblings(info), f"The repository {self._repo}")

    def _address(self, file: SourceFile, commit: str) -> str:
        # Names come from the allow-list and hold nothing that an address would need quoted.
        return f"{self._endpoint}/{self._repo}/resolve/{commit}/{file.path}"

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": "edgekiln", "Accept-Encoding": "identity"}
        if self._credential is not None:
            headers["Authorization"] = f"Bearer {self._credential}"
        return headers

    @contextmanager
    def _report_errors(self) -> Iterator[None]:
        """Turn the client's errors into typed ones whose text and chain hold nothing that the server sent."""
        failure: EdgeKilnError
        try:
            yield
        except OfflineModeIsEnabled:
            failure = InvalidSettings("HF_HUB_OFFLINE is set for the worker, so no hub can be read; unset it.")
        except HfHubHTTPError as error:
            failure = self._describe(error, error.response.status_code)
        except httpx2.HTTPError as error:
            failure = SourceUnavailable(
                f"{self._endpoint} could not be reached or broke off ({type(error).__name__}); retry later."
            )
        else:
            return
        raise failure from None

    def _describe(self, error: HfHubHTTPError, status: int) -> EdgeKilnError:
        """Return the typed error for a refusal of the hub."""
        what = f"The repository {self._repo} at {self._endpoint}"
        if isinstance(error, RevisionNotFoundError):
            return SourceNotFound(f"{what} has no revision {self._revision!r}; check it.", status=status)
        if isinstance(error, GatedRepoError | DisabledRepoError):
            return SourceForbidden(f"{what} is gated or disabled; ask its owner for access, or give another token.")
        if status in (401, 403):
            # Without a valid token a hub answers so for private and for missing repositories alike.
            remedy = "the token given does not suffice" if self._credential else "give a token that may read it"
            return SourceForbidden(f"{what} is private or does not exist: {remedy}.", status=status)
        if isinstance(error, RemoteEntryNotFoundError):
            return SourceNotFound(f"{what} lists a file that it does not serve; report it to its owner.", status=status)
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            return SourceNotFound(
                f"{what} does not exist; check its name, or give a token if it is private.", status=status
            )
        return SourceUnavailable(f"{what} could not be read (HTTP {status}); retry later.", status=status)


@contextmanager
def _open(web: WebClient, rules: HostRules, address: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
    """Open a GET; raises the hub library's errors for refusals.

    Redirects within the hub are followed with its session. One that leaves it is a stranger's address: `web` judges it,
    and what it redirects to, and the token stays behind.
    """
    first = address
    for _ in range(MAX_REDIRECTS + 1):
        if not _is_same_server(first, address):
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
            if not _is_proxied(address):
                with web.open("GET", address, headers) as response:
                    hf_raise_for_status(response)
                    yield response
                return
            _require_public(rules, address)
        with get_session().stream(
            "GET", address, headers=headers, timeout=TIMEOUT_S, follow_redirects=False
        ) as response:
            if not response.is_redirect:
                hf_raise_for_status(response)
                yield response
                return
            address = urljoin(address, response.headers["Location"])
    raise SourceUnavailable(f"The hub redirects more than {MAX_REDIRECTS} times; check the endpoint.")


def _is_same_server(first: str, address: str) -> bool:
    home, target = urlsplit(first), urlsplit(address)
    return (home.scheme, home.netloc) == (target.scheme, target.netloc)


def _is_proxied(address: str) -> bool:
    """Tell whether this worker reaches an address through a proxy of its environment, as the hub's client does."""
    parts, proxies = urlsplit(address), getproxies()
    return bool(proxies.get(parts.scheme) or proxies.get("all")) and not proxy_bypass(parts.hostname or "")


def _require_public(rules: HostRules, address: str) -> None:
    """Judge where a proxy is asked to lead; a name that only it can resolve is left to it."""
    try:
        place = read_place(address)
    except ValueError as error:
        raise SourceUnavailable(f"The hub redirects to an address that cannot be used: {error}.") from None
    rules.require_host(place)
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)}
    except OSError:
        found = set()
    for each in found:
        rules.require_address(place, each)


def _read_endpoint(endpoint: str | None) -> str:
    """Return the hub's address: the request's, else `HF_ENDPOINT`, else the public Hub."""
    text = (endpoint or os.environ.get("HF_ENDPOINT") or str(constants._HF_DEFAULT_ENDPOINT)).rstrip("/")
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidRequest(f"The hub endpoint {text!r} must be an address such as 'https://huggingface.co'.")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest(
            "The hub endpoint must not hold a user name or password; give the token as the credential."
        )
    return text


def _is_private_way(endpoint: str) -> bool:
    """Tell whether nobody on the way to the hub can read a token: https, or this very host."""
    parts = urlsplit(endpoint)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _read_siblings(info: ModelInfo) -> Iterator[SourceFile]:
    """Yield what the hub lists; sizes of needed files must be stated."""
    for sibling in info.siblings or ():
        lfs_sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        if lfs_sha256 is not None and not _SHA256.fullmatch(lfs_sha256):
            raise CheckpointInvalid(f"The hub states a malformed SHA-256 for {sibling.rfilename!r}.")
        git_blob = sibling.blob_id if lfs_sha256 is None else None
        size = sibling.size
        yield SourceFile(sibling.rfilename, size if isinstance(size, int) and size >= 0 else -1, lfs_sha256, git_blob)
