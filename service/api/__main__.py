"""`python -m service.api`: serves the API with the settings of the environment.

Started by `service.supervisor`, which hands over a listening socket (`--fd`), or by an operator.
"""

from __future__ import annotations

import argparse
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.api.app import make_app
from service.api.context import Context
from service.errors import EdgeKilnError
from service.ledger.database import Database, migrate
from service.metrics import LedgerCollector, serve_metrics
from service.process_log import begin_log
from service.queue import Poker
from service.queue import make_app as make_queue
from service.settings import Settings, load_settings
from service.storage import open_configured_store
from service.tracing import begin_tracing, end_tracing

#: How long requests in progress may go on after the signal to stop.
_DRAIN_S = 3


class _Server(uvicorn.Server):
    """Tells endless answers (event streams) to end as soon as the signal to stop arrives."""

    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self.context = context

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.context.stopping.set()
        super().handle_exit(sig, frame)


def serve(settings: Settings, listener: socket.socket | None = None) -> None:
    """Serve until SIGTERM or SIGINT; on `listener`, if one is given, else on the settings' address."""
    migrate(settings.ledger_url)
    store = open_configured_store(settings)
    database = Database(settings.ledger_url, Poker(make_queue(settings)))
    registry = CollectorRegistry()
    registry.register(LedgerCollector(database))
    try:
        serve_metrics(registry, settings.metrics_host, settings.api_metrics_port)
        app = make_app(settings, database, store)
        server = _Server(make_config(settings, app), app.state.context)
        server.run(sockets=None if listener is None else [listener])
    finally:
        database.close()
        end_tracing()


def make_config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    """Return how the server runs."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # Its loggers speak as all others do.
        log_config=None,
        # Addresses in forwarded headers are claims: only of these proxies are they believed.
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )


def main(argv: list[str] | None = None) -> int:
    """Serve; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.api", description="Serve the EdgeKiln API.")
    parser.add_argument("--fd", type=int, help="file descriptor of a listening socket to take over")
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings()
        begin_log(settings.log_format)
        begin_tracing("edgekiln-api")
        serve(settings, None if arguments.fd is None else socket.socket(fileno=arguments.fd))
    except EdgeKilnError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
