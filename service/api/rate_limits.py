"""How many requests a key, a tenant and an address may make in a minute.

Counted over a sliding window: in Redis where that is the broker, so that replicas of the API count together, else in
this process. While Redis is away each replica counts for itself: nothing is served without a limit, and nothing is
refused for want of Redis. Called by `service.api.guards`.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from service.errors import RateLimited
from service.ledger.access import Caller
from service.settings import Settings

log = logging.getLogger(__name__)

_REDIS = ("redis://", "rediss://")
#: A request waits no longer for a count, and the next ones not at all for a while.
_REDIS_TIMEOUT_S = 0.5
_REDIS_PAUSE_S = 5.0


@dataclass(frozen=True)
class _Limit:
    """One bound: so many in a minute for each of something."""

    item: RateLimitItem
    #: As its refusal words it.
    of_what: str


class RateLimits:
    """The limits of one API process."""

    def __init__(self, settings: Settings) -> None:
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared: SlidingWindowCounterRateLimiter | None = None
        if settings.broker_url.startswith(_REDIS):
            storage = RedisStorage(
                settings.broker_url,
                key_prefix="edgekiln-limits",
                wrap_exceptions=True,
                socket_timeout=_REDIS_TIMEOUT_S,
                socket_connect_timeout=_REDIS_TIMEOUT_S,
            )
            self._shared = SlidingWindowCounterRateLimiter(storage)
        self._shared_again_at = 0.0
        self._key = _make_limit("key", settings.key_requests_per_min, "requests with this key")
        self._tenant = _make_limit("tenant", settings.tenant_requests_per_min, "requests of this tenant")
        self._address = _make_limit("address", settings.wrong_keys_per_min, "wrong keys from this address")

    def admit(self, caller: Caller) -> None:
        """Count a request with a valid key; raises `RateLimited`."""
        for limit, name in ((self._key, caller.key_id), (self._tenant, caller.tenant_id)):
            if limit is not None and not self._ask("hit", limit, str(name)):
                raise self._refuse(limit, str(name))

    def note_wrong_key(self, address: str) -> None:
        """Count a key that was not valid."""
        if self._address is not None:
            self._ask("hit", self._address, address)

    def require_patience(self, address: str) -> None:
        """Refuse whoever came with too many wrong keys, before the next one is looked at; raises `RateLimited`."""
        if self._address is not None and not self._ask("test", self._address, address):
            raise self._refuse(self._address, address)

    def _ask(self, question: str, limit: _Limit, name: str) -> bool:
        if self._shared is not None and time.monotonic() >= self._shared_again_at:
            try:
                return bool(getattr(self._shared, question)(limit.item, name))
            except StorageError as error:
                log.warning("requests are counted by this process alone: %s", type(error.storage_error).__name__)
                self._shared_again_at = time.monotonic() + _REDIS_PAUSE_S
        return bool(getattr(self._own, question)(limit.item, name))

    def _refuse(self, limit: _Limit, name: str) -> RateLimited:
        counted_by = self._own
        if self._shared is not None and time.monotonic() >= self._shared_again_at:
            counted_by = self._shared
        try:
            free_at = counted_by.get_window_stats(limit.item, name).reset_time
        except StorageError:
            free_at = time.time() + 1
        retry_after_s = max(1, math.ceil(free_at - time.time()))
        return RateLimited(
            f"There were {limit.item.amount} {limit.of_what} within a minute; come again in {retry_after_s} s.",
            retry_after_s=retry_after_s,
            limit_per_min=limit.item.amount,
        )


def _make_limit(namespace: str, most: int, of_what: str) -> _Limit | None:
    return _Limit(RateLimitItemPerMinute(most, namespace=f"edgekiln-{namespace}"), of_what) if most else None
