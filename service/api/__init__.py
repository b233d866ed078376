"""The REST API: thin routers over the ledger and the store.

Owns everything that is HTTP: routes, documents' schemas, problem documents, access. Must not change states itself
(each handler makes one ledger call, which commits before it returns) and must not know steps' innards. Started by
`python -m service.api`; `make_app` is for tests and for hosts with a server of their own.
"""

from __future__ import annotations

from service.api.app import make_app

__all__ = ["make_app"]
