"""Puts light steps in the place of the real ones, and takes the sweep out of workers for the control.

Everything else of a worker is real: runner, keeper, sandbox, children, store, publish. Called by `light_app` in worker
processes, and by tests that run a worker of their own.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any, cast

from service.ledger.keys import Toolchain
from workers import process
from workers.catalog import CATALOG, StepCode, read_toolchain
from workers.sandbox import Sandbox


class LightSandbox(Sandbox):
    """One zygote, for light steps."""

    def warm(self, pool: str) -> None:
        """There is no converter to import."""


def light_codes() -> dict[str, StepCode]:
    """Return the catalogue with light steps in it."""
    return {
        kind: replace(code, target=f"tests.chaos.light_steps:{kind}", pool="light", sources=())
        for kind, code in CATALOG.items()
    }


def make_sandbox(*_: Any, **options: Any) -> Sandbox:
    """Return a sandbox for light steps, whatever was to be preloaded."""
    return LightSandbox({"light": ["tests.chaos.light_steps"]}, target_prefixes=("tests.",), **options)


def install() -> None:
    """Let workers of this process run light steps."""
    cast("MutableMapping[str, StepCode]", CATALOG).update(light_codes())
    process.Sandbox = make_sandbox  # type: ignore[assignment, misc]
    if tools := os.environ.get("LIGHT_TOOLS"):
        # As if another version of a converter were installed.
        toolchain = read_toolchain()
        changed = Toolchain({**toolchain.versions, "converter": tools}, toolchain.revisions)
        process.read_toolchain = lambda: changed


def remove_sweep() -> None:
    """Let workers repair nothing that is lost: the control."""
    process.WorkerProcess._sweep = lambda _: None  # type: ignore[method-assign]
