"""The workers' Celery entry with light steps: `celery -A tests.chaos.light_app worker --pool=threads ...`."""

from __future__ import annotations

import os

from tests.chaos import light_catalog

light_catalog.install()
if os.environ.get("CHAOS_SWEEPS") == "False":
    light_catalog.remove_sweep()

from workers.app import app  # noqa: E402 - after the patch

__all__ = ["app"]
