"""What a step that reads a source is told beside the source: what this worker's operator allows, and its credential.

None of it enters a key, a ledger or a message: it is read from the worker's settings for each step, and a credential
goes to the child by a pipe. Called by `workers.runner`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.ledger import tokens
from service.ledger.access import DEFAULT_TENANT
from service.ledger.claims import Claim
from service.ledger.database import Database
from service.sealing import Seal
from service.settings import Settings
from service.sources import read_host_rules, require_bucket
from service.web_addresses import HostRules


def describe_access(settings: Settings, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters `source` and, where there is something to say, `access`; raises `SourceNotAllowed`."""
    if source["kind"] == "hub":
        # Which servers a hub stores its files on is the hub's to say, but not inside this network.
        rules = HostRules(private_hosts=settings.private_source_hosts)
        endpoint = {"endpoint": settings.hub_endpoint} if settings.hub_endpoint else {}
        return {"source": {**endpoint, **source}, "access": rules.to_json()}
    if source["kind"] == "https":
        return {"source": source, "access": read_host_rules(settings).to_json()}
    if source["kind"] == "s3":
        # This worker's own settings decide, whatever those said that admitted the job.
        require_bucket(source["bucket"], source["prefix"], settings)
        access = {"endpoint_url": settings.source_s3_endpoint_url, "region": settings.source_s3_region}
        return {"source": source, "access": access}
    return {"source": source}


def find_credential(settings: Settings, database: Database, claim: Claim) -> Any:
    """Return what the source of a step is read with, if anything: a tenant's own token before the settings'.

    The settings' own hub token is the default tenant's. Raises `InvalidSettings` for a token that cannot be opened.
    """
    source = claim.params["source"]
    if source["kind"] == "hub":
        token = tokens.find_token(database, Seal(settings.token_keys), claim.tenant_id, "hub")
        if token is not None or claim.tenant_id != DEFAULT_TENANT:
            return token
    return read_credential(settings, source)


def read_credential(settings: Settings, source: Mapping[str, Any]) -> Any:
    """Return what the source's kind needs to be read with by the settings, if anything; no other kind gets it."""
    if source["kind"] == "hub":
        return settings.hub_token or None
    if source["kind"] == "s3" and settings.source_s3_access_key_id:
        return {
            "access_key_id": settings.source_s3_access_key_id,
            "secret_access_key": settings.source_s3_secret_access_key,
        }
    return None
