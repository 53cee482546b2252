"""What a validation registry says (ERC-8004; contracts/validation_registry.vy): who was asked about an agent's work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tessera.chain.faces import ValidationRegistry
from tessera.chain.indexer.facts import Fact, Reducer, Said, Value, item_id
from tessera.chain.indexer.queries import Queries
from tessera.core.ids import Account

__all__ = ["VALIDATION_REGISTRY", "Response", "Validation", "ValidationView"]


def _requested(event: ValidationRegistry.ValidationRequest) -> Iterator[Said]:
    request, detail = item_id(event.requestHash), {"agent": item_id(event.agentId), "uri": event.requestURI}
    yield Said("requested", event.validatorAddress, request, detail=detail)
    yield Said("questioned", event.validatorAddress, item_id(event.agentId), detail={"request": request})


def _responded(event: ValidationRegistry.ValidationResponse) -> Iterator[Said]:
    detail: dict[str, Value] = {
        "response": event.response,
        "uri": event.responseURI,
        "hash": item_id(event.responseHash),
        "tag": event.tag,
    }
    yield Said("responded", event.validatorAddress, item_id(event.requestHash), detail=detail)


VALIDATION_REGISTRY = Reducer(
    "validation_registry",
    says={
        ValidationRegistry.ValidationRequest: _requested,
        ValidationRegistry.ValidationResponse: _responded,
    },
)


@dataclass(frozen=True, slots=True)
class Response:
    """A validator's answer."""

    value: int  # 0 (failed) to 100 (passed)
    tag: str
    uri: str
    hash: str  # 0x and 64 hex digits
    time: int  # seconds since 1970
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Validation:
    """A request to a validator, and his answers."""

    request: str  # 0x and 64 hex digits
    agent: int
    validator: Account
    uri: str
    responses: tuple[Response, ...]  # the oldest first; the last one holds
    time: int  # of the request, seconds since 1970
    tx_hash: str  # of the request


class ValidationView:
    """The requests in one registry."""

    def __init__(self, queries: Queries, source: str = "validation_registry") -> None:
        self._queries, self._source = queries, source

    def validation(self, request: str) -> Validation | None:
        return next(iter(self._validations([request])), None)

    def validations(
        self, agent: int | None = None, validator: Account | None = None, *, limit: int = 100
    ) -> list[Validation]:
        """About an agent, by a validator, or both; the newest request first."""
        item = "" if agent is None else str(agent)
        facts = self._queries.facts(self._source, "questioned", validator or "", item, limit=limit)
        return self._validations([fact.detail["request"] for fact in facts])

    def _validations(self, requests: Sequence[str]) -> list[Validation]:
        histories = self._queries.histories(self._source, requests)
        return [_validation(history) for history in histories.values() if history]


def _validation(history: Sequence[Fact]) -> Validation:
    requested = next(fact for fact in history if fact.kind == "requested")
    return Validation(
        request=requested.item,
        agent=int(requested.detail["agent"]),
        validator=Account(requested.account),
        uri=requested.detail["uri"],
        responses=tuple(
            Response(f.detail["response"], f.detail["tag"], f.detail["uri"], f.detail["hash"], f.time, f.tx_hash)
            for f in history
            if f.kind == "responded"
        ),
        time=requested.time,
        tx_hash=requested.tx_hash,
    )
