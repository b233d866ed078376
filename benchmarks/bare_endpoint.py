"""The least that a job API can be: one FastAPI endpoint, one INSERT, one commit.

`benchmarks/serving.py` compares with it:

BARE_DATABASE_URL=postgresql+psycopg://... python benchmarks/bare_endpoint.py --fd 3
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import JSON, Column, MetaData, String, Table, create_engine, insert

TABLE = Table("bare_jobs", MetaData(), Column("id", String(32), primary_key=True), Column("request", JSON))
app = FastAPI()
engine = create_engine(os.environ["BARE_DATABASE_URL"], pool_size=10, max_overflow=20)


class Request(BaseModel):
    """A body of any content."""

    source: dict[str, Any]
    recipes: list[str]


@app.post("/v1/jobs", status_code=201)
def submit(request: Request) -> dict[str, str]:
    """Store a body."""
    job_id = f"job_{secrets.token_hex(8)}"
    with engine.begin() as connection:
        connection.execute(insert(TABLE).values(id=job_id, request=request.model_dump()))
    return {"id": job_id}


def main() -> None:
    """Serve with the settings that EdgeKiln's API has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    listener = socket.socket(fileno=parser.parse_args().fd)
    TABLE.create(engine, checkfirst=True)
    config = uvicorn.Config(app, log_config=None, proxy_headers=False, server_header=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
