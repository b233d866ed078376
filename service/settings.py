"""One frozen `Settings`, read from `EDGEKILN_*` environment variables and checked at start.

Owns every tunable of the service and the workers, with its unit in its name. Called once by each process's entry
(`service.commands`, `service.api.__main__`, `workers.app`).
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.devices import PHONE_CLASS
from service.errors import InvalidSettings
from service.machine import find_usable_cores, find_usable_memory_bytes

_GIB = 1024**3
_TOKEN_KEY = re.compile(r"[A-Za-z0-9_-]{43}=")


class Settings(BaseSettings):
    """What an operator may set; defaults are the embedded profile on one host."""

    model_config = SettingsConfigDict(env_prefix="EDGEKILN_", frozen=True, extra="ignore")

    #: Where the embedded profile keeps ledger, store, broker, work folders and logs.
    data_dir: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("edgekiln")))
    #: SQLAlchemy URL of the ledger; empty means SQLite in `data_dir`.
    database_url: str = Field(default="", repr=False)
    #: Celery broker URL; empty means folders in `data_dir`.
    broker_url: str = Field(default="", repr=False)
    #: `file:///...` or `s3://bucket/prefix`; empty means a folder in `data_dir`.
    store_url: str = ""
    #: Name of this machine, the same for all workers on it, in containers too; empty means the system's name and id.
    host_name: str = Field(default="", max_length=100)
    #: File into which a worker writes its id, for `edgekiln health worker`; empty means none.
    worker_file: str = ""

    #: Address and port of the API. Any address other than loopback requires API keys.
    host: str = "127.0.0.1"
    port: int = Field(default=8711, ge=0, le=65535)
    #: Further names that the Host header may carry.
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    #: Folders below which a REST request may name a source.
    source_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    #: The only hosts that web folders are read from, where any are named; `*.example.org` means all below it.
    source_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    #: Hosts of web folders that may lie at addresses that are not public, and may be read over http.
    private_source_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    #: Buckets, or `bucket/prefix`, that sources may name; none unless it is set.
    source_s3_buckets: Annotated[tuple[str, ...], NoDecode] = ()
    #: S3 server, region and key that source buckets are read with; the key reaches fetching children by pipe only.
    source_s3_endpoint_url: str = ""
    source_s3_region: str = ""
    source_s3_access_key_id: str = ""
    source_s3_secret_access_key: str = Field(default="", repr=False)
    #: How processes write their own logs to standard error: lines for people, or JSON for collectors.
    log_format: Literal["text", "json"] = "text"
    #: Address of metrics for Prometheus, and their ports in the API and in a worker; 0 means none.
    metrics_host: str = "127.0.0.1"
    api_metrics_port: int = Field(default=0, ge=0, le=65535)
    worker_metrics_port: int = Field(default=0, ge=0, le=65535)
    #: Reverse proxies, as addresses or networks, whose word on a client's address is taken.
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = ()
    #: Requests a minute of one key and of all keys of a tenant, and wrong keys a minute of one address; 0: no limit.
    key_requests_per_min: int = Field(default=3000, ge=0)
    tenant_requests_per_min: int = Field(default=6000, ge=0)
    wrong_keys_per_min: int = Field(default=30, ge=0)
    #: Largest request body.
    max_body_bytes: int = Field(default=1024**2, ge=1024)
    #: Largest upload (calibration text, prompts, evaluation files).
    max_upload_bytes: int = Field(default=64 * 1024**2, ge=1)
    #: Largest file that may be uploaded in pieces, and how long the next piece is waited for.
    max_resumable_bytes: int = Field(default=64 * _GIB, ge=1)
    keep_unfinished_uploads_s: float = Field(default=24 * 3600.0, gt=0, allow_inf_nan=False)
    #: Most variants (engines x recipes) one job may ask for.
    max_variants: int = Field(default=256, ge=1)

    #: How long a claim holds without a heartbeat; recovery of lost work takes this plus `sweep_s`.
    lease_s: float = Field(default=30.0, gt=0)
    #: How often a running step renews its lease.
    heartbeat_s: float = Field(default=5.0, gt=0)
    #: How often a running step looks whether it was cancelled.
    cancel_poll_s: float = Field(default=0.5, gt=0)
    #: How often every worker re-pokes whatever is due.
    sweep_s: float = Field(default=10.0, gt=0)
    #: How long a benchmark waits for an idle host before it holds back other work there.
    benchmark_patience_s: float = Field(default=60.0, ge=0)
    #: Fresh processes per benchmark.
    benchmark_processes: int = Field(default=6, ge=1)
    #: Share of speed lost, or of memory added, from which a measurement is a regression of the one before it.
    regression_share: float = Field(default=0.10, ge=0)
    #: Transient errors or crashes of its child after which a step is given up.
    max_failures: int = Field(default=3, ge=1)
    #: Lost workers in a row after which a step is parked.
    max_losses: int = Field(default=10, ge=1)
    #: First pause before a failed step is tried again; doubles each time.
    retry_pause_s: float = Field(default=5.0, ge=0)

    #: How long files that are only kept for reuse stay without being used.
    keep_intermediates_s: float = Field(default=7 * 24 * 3600.0, ge=0, allow_inf_nan=False)
    #: How long uploads stay that no job and no schedule names.
    keep_uploads_s: float = Field(default=7 * 24 * 3600.0, ge=0, allow_inf_nan=False)
    #: How much the partial downloads and copied blobs of a host may take on its disk, and how long they stay unused.
    max_cache_bytes: int = Field(default=50 * _GIB, ge=0)
    keep_cache_s: float = Field(default=7 * 24 * 3600.0, ge=0, allow_inf_nan=False)
    #: How long jobs stay that have ended: those that published nothing, and those with artifacts; `inf`: for ever.
    keep_unpublished_jobs_s: float = Field(default=math.inf, ge=0)
    keep_published_jobs_s: float = Field(default=math.inf, ge=0)

    #: Steps of each resource class that one worker runs at once.
    fetch_slots: int = Field(default=2, ge=0)
    convert_slots: int = Field(default=1, ge=0)
    light_slots: int = Field(default_factory=find_usable_cores, ge=0)
    device_slots: int = Field(default=1, ge=0)

    #: The adb server that a device worker follows; it may be on another host.
    adb_host: str = "127.0.0.1"
    adb_port: int = Field(default=5037, ge=1, le=65535)
    #: How often a device worker looks what is attached, and what is to be measured.
    device_poll_s: float = Field(default=1.0, gt=0)
    #: How long a hot phone may take to cool down before each process.
    cool_down_s: float = Field(default=600.0, ge=0)
    #: How long a phone that was started again may take until it answers.
    boot_s: float = Field(default=180.0, gt=0)
    #: How long a phone may take for an answer that it has at hand; one that takes longer hangs.
    device_answer_s: float = Field(default=20.0, gt=0)
    #: How long one process of a tool may run on a phone.
    device_process_s: float = Field(default=600.0, ge=1)
    #: Program that switches a phone's power off and on again; gets its serial number. Empty means none.
    power_cycle_program: str = ""

    #: Anonymous memory one step may use; 0 means nine tenths of what this process may use of the host's.
    step_memory_bytes: int = Field(default=0, ge=0)
    #: Longest time one step may run, by resource class.
    fetch_deadline_s: float = Field(default=6 * 3600.0, gt=0)
    convert_deadline_s: float = Field(default=6 * 3600.0, gt=0)
    light_deadline_s: float = Field(default=2 * 3600.0, gt=0)
    device_deadline_s: float = Field(default=2 * 3600.0, gt=0)

    #: PEM file with the private key that publications are signed with; empty means that they are not.
    signing_key_file: str = ""

    #: S3 endpoint, region and checksum behaviour; credentials come from boto3's own chain.
    s3_endpoint_url: str = ""
    s3_region: str = ""
    s3_request_checksums: Literal["when_required", "when_supported"] = "when_required"
    s3_response_checksums: Literal["when_required", "when_supported"] = "when_required"
    #: Checksum of every upload, which the server checks; `md5` for servers that do not know SHA-256.
    s3_upload_checksum: Literal["sha256", "md5"] = "sha256"
    #: Size of the parts of large files, and how many of one file are on their way at once.
    s3_part_bytes: int = Field(default=16 * 1024**2, ge=5 * 1024**2)
    s3_connections: int = Field(default=8, ge=1, le=64)
    #: Hugging Face Hub endpoint; empty means the client's own default (or `HF_ENDPOINT`).
    hub_endpoint: str = Field(default_factory=lambda: os.environ.get("HF_ENDPOINT", ""))
    #: Access token for the Hub; given to `fetch` children by pipe only.
    hub_token: str = Field(default_factory=lambda: os.environ.get("HF_TOKEN", ""), repr=False)
    #: Keys that tenants' tokens are sealed with; the first seals, all of them open.
    token_keys: Annotated[tuple[str, ...], NoDecode] = Field(default=(), repr=False)

    @field_validator(
        "allowed_hosts",
        "source_roots",
        "source_hosts",
        "private_source_hosts",
        "source_s3_buckets",
        "trusted_proxies",
        "token_keys",
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        """People separate lists like PATH; JSON, which `to_environment` writes, also takes names with a colon."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return tuple(part for part in value.split(os.pathsep) if part)

    @field_validator("token_keys")
    @classmethod
    def _are_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_TOKEN_KEY.fullmatch(key) for key in value):
            raise ValueError("each must be 32 bytes in URL-safe base64, as `edgekiln tokens key` makes them")
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value

    @field_validator("power_cycle_program")
    @classmethod
    def _is_program(cls, value: str) -> str:
        if value and not (Path(value).is_absolute() and os.access(value, os.X_OK)):
            raise ValueError("it must be the absolute path of a program that may be run")
        return value

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("source_roots")
    @classmethod
    def _resolved(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(root.expanduser().resolve() for root in value)

    @model_validator(mode="after")
    def _heartbeat_fits_lease(self) -> Settings:
        if self.heartbeat_s * 2 > self.lease_s:
            raise ValueError(
                "EDGEKILN_HEARTBEAT_S must be at most half of EDGEKILN_LEASE_S: one late heartbeat would lose the step"
            )
        return self

    @model_validator(mode="after")
    def _jobs_outlive_what_they_made(self) -> Settings:
        if min(self.keep_unpublished_jobs_s, self.keep_published_jobs_s) < self.keep_intermediates_s:
            raise ValueError(
                "EDGEKILN_KEEP_UNPUBLISHED_JOBS_S and EDGEKILN_KEEP_PUBLISHED_JOBS_S must be at least "
                "EDGEKILN_KEEP_INTERMEDIATES_S: jobs say when a file was last used"
            )
        return self

    @property
    def ledger_url(self) -> str:
        """The database URL in force."""
        if self.database_url:
            return self.database_url
        # Takes a while to import, and clients have no ledger.
        from sqlalchemy.engine import URL

        # A folder's name may hold what means something in a URL.
        return URL.create("sqlite", database=str(self.data_dir / "ledger.db")).render_as_string()

    @property
    def object_store_url(self) -> str:
        """The object store URL in force."""
        return self.store_url or (self.data_dir / "store").as_uri()

    @property
    def work_dir(self) -> Path:
        """Folder of the running steps' own folders."""
        return self.data_dir / "work"

    @property
    def cache_dir(self) -> Path:
        """Folder of partial downloads that a later attempt resumes, and of this host's copies of blobs."""
        return self.data_dir / "cache"

    @property
    def memory_limit_bytes(self) -> int:
        """Anonymous memory one step may use on this host."""
        if self.step_memory_bytes:
            return self.step_memory_bytes
        return find_usable_memory_bytes() * 9 // 10

    def slots(self) -> dict[str, int]:
        """Steps of each resource class that one worker of this host runs at once."""
        return {
            "fetch": self.fetch_slots,
            "convert": self.convert_slots,
            "light": self.light_slots,
            "device": self.device_slots,
        }

    def deadline_s(self, resource_class: str) -> float:
        """Longest time one step of `resource_class` may run."""
        # A phone is a device; the class of its steps has no setting of its own.
        name = "device" if resource_class == PHONE_CLASS else resource_class
        return float(getattr(self, f"{name}_deadline_s"))

    @property
    def condemned_s(self) -> float:
        """How long a condemned blob waits for its deletion: longer than any upload takes to be committed."""
        return 2 * max(self.deadline_s(resource_class) for resource_class in self.slots())

    def to_environment(self) -> dict[str, str]:
        """Return the variables that give a subprocess these same settings."""
        variables: dict[str, str] = {}
        for name, value in self.model_dump().items():
            text = json.dumps([str(part) for part in value]) if isinstance(value, tuple) else str(value)
            variables[f"EDGEKILN_{name.upper()}"] = text
        return variables


def load_settings(overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read and check the settings; `overrides` (from command-line flags) win over the environment.

    Raises `InvalidSettings` with one line per bad setting.
    """
    try:
        return Settings(**{name: value for name, value in (overrides or {}).items() if value is not None})
    except ValidationError as error:
        lines = [_describe_finding(item["loc"], item["msg"], item["input"]) for item in error.errors()]
        raise InvalidSettings("Settings are not usable. " + "; ".join(lines)) from error


def _describe_finding(place: tuple[int | str, ...], message: str, given: Any) -> str:
    """Say what is wrong with one setting, by the name that an operator knows."""
    sentence = message.removeprefix("Value error, ")
    if not place:
        return sentence
    field = Settings.model_fields.get(str(place[0]))
    shown = given if field is None or field.repr else "..."
    return f"EDGEKILN_{str(place[0]).upper()}={shown!s}: {sentence}"
