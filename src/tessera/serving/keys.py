"""API keys: who holds one is served by it.

Invariants: a key is compared in equal time; one that we do not know is no key, since official clients always send one.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from tessera.core.hashing import sha256
from tessera.serving.charging import API_KEY_HEADER, Free, PaidRequest

__all__ = ["OperatorKeys", "bearer"]


class OperatorKeys:
    """The operator's own keys: nothing is paid."""

    def __init__(self, api_keys: Iterable[str]) -> None:
        self._digests = tuple(sha256(api_key.encode()) for api_key in api_keys)

    async def hold(self, request: PaidRequest) -> Free | None:
        digest = sha256(bearer(request).encode(errors="replace"))
        known = [hmac.compare_digest(digest, key) for key in self._digests]  # all of them: equal time for every key
        return Free(f"key {digest.hex()[:32]}") if any(known) else None


def bearer(request: PaidRequest) -> str:
    """The API key of a request; empty without one."""
    scheme, _, api_key = request.headers.get(API_KEY_HEADER, "").partition(" ")
    return api_key.strip() if scheme.lower() == "bearer" else ""
