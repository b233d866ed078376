"""The commands of `edgekiln`, one module a theme; `service.cli` puts them together.

Owns what people read and type. Must not do work itself: it speaks to a server through `service.client`, to the
embedded profile through `service.supervisor`. Modules here import what is heavy (httpx, pydantic, SQLAlchemy, rich)
inside functions, so that `edgekiln --help` answers at once.
"""
