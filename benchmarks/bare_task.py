"""A Celery task without content, with its result on the same Redis. `benchmarks/serving.py` compares with it."""

from __future__ import annotations

import os

from celery import Celery

app = Celery(broker=os.environ["BARE_BROKER_URL"], backend=os.environ["BARE_BROKER_URL"])
app.conf.worker_prefetch_multiplier = 1


@app.task(name="bare.nothing")
def nothing() -> None:
    """Do nothing."""
