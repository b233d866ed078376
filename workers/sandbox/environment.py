"""Which environment variables a zygote and a child are given: named ones, and no others.

Owns the allow-lists. Called by `parent`; credentials of the worker (database, broker, store, hub) are never
among them, because only the names listed here are copied.
"""

from __future__ import annotations

import os
import site
from collections.abc import Mapping
from pathlib import Path

_ALWAYS = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE")
#: Only for steps with network: how to reach it and whom to trust.
_WITH_NETWORK = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "https_proxy",
    "http_proxy",
    "no_proxy",
    "HF_ENDPOINT",
)


def build_base_environment(home_dir: Path, threads: int | None) -> dict[str, str]:
    """Return the environment of a zygote, the ground of its children's; `threads` bounds numeric libraries."""
    environment = _copy(_ALWAYS)
    environment.update(
        HOME=str(home_dir),
        TMPDIR=str(home_dir),
        PYTHONPATH=os.pathsep.join(_list_import_paths(os.environ)),
        # Equal inputs give equal bytes: the order of sets must not differ from run to run.
        PYTHONHASHSEED="0",
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        TF_CPP_MIN_LOG_LEVEL="2",
        # Threads that wait must not spin: several children share the cores, and spinning ones halve each other.
        OMP_WAIT_POLICY="PASSIVE",
    )
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def build_child_environment(home_dir: Path, scratch_dir: Path, threads: int | None, *, network: bool) -> dict[str, str]:
    """Return the environment of one child."""
    environment = build_base_environment(home_dir, threads)
    environment["TMPDIR"] = str(scratch_dir)
    if network:
        environment.update(_copy(_WITH_NETWORK))
    else:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _copy(names: tuple[str, ...]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def _list_import_paths(environment: Mapping[str, str]) -> list[str]:
    """Return where a child finds this package and what the operator added, as absolute paths."""
    package_root = str(Path(__file__).parents[2])
    paths = [str(Path(path).absolute()) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    # An installed package is found without help; naming its folder here would shadow the standard library.
    if package_root not in site.getsitepackages():
        paths.insert(0, package_root)
    return list(dict.fromkeys(paths))
