"""What an identity registry says (ERC-8004; contracts/identity_registry.vy): agents, and whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tessera.chain.faces import IdentityRegistry
from tessera.chain.indexer.facts import Fact, Place, Reducer, Said, item_id
from tessera.chain.indexer.queries import Queries
from tessera.core.ids import Account, parse_account

__all__ = ["IDENTITY_REGISTRY", "Agent", "AgentView", "Metadata"]

_WALLET_KEY = "agentWallet"
PAGE = 200  # agents folded at once
_TERMS = ("registered", "described", "owned", "wallet", "metadata")


def _registered(event: IdentityRegistry.Registered) -> Iterator[Said]:
    item = item_id(event.agentId)
    yield Said("registered", event.owner, item)
    yield Said("described", event.owner, item, detail={"uri": event.agentURI})


def _described(event: IdentityRegistry.URIUpdated) -> Iterator[Said]:
    yield Said("described", event.updatedBy, item_id(event.agentId), detail={"uri": event.newURI})


def _owned(event: IdentityRegistry.Transfer) -> Iterator[Said]:
    yield Said("owned", event.receiver, item_id(event.tokenId))


def _set(event: IdentityRegistry.MetadataSet) -> Iterator[Said]:
    item, value = item_id(event.agentId), event.metadataValue
    if event.metadataKey == _WALLET_KEY:  # the registry writes an address or nothing
        yield Said("wallet", parse_account("0x" + value.hex()) if len(value) == 20 else "", item)
    else:
        yield Said("metadata", item=item, detail={"key": event.metadataKey, "value": item_id(value)})


IDENTITY_REGISTRY = Reducer(
    "identity_registry",
    says={
        IdentityRegistry.Registered: _registered,
        IdentityRegistry.URIUpdated: _described,
        IdentityRegistry.Transfer: _owned,
        IdentityRegistry.MetadataSet: _set,
    },
    silent=(IdentityRegistry.Approval, IdentityRegistry.ApprovalForAll),
)


@dataclass(frozen=True, slots=True)
class Metadata:
    """What an agent says of itself under one key."""

    value: bytes
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent as its events tell it."""

    id: int
    uri: str
    owner: Account
    wallet: Account | None  # None: it is paid nowhere
    metadata: Mapping[str, Metadata]
    wallets: Mapping[Account, Place]  # past ones too -> since when
    owners: Sequence[tuple[Place, Account]]  # since when; the oldest first
    registered_at: int  # seconds since 1970
    proofs: Mapping[str, str]  # what happened ("registered", "owned", "wallet", ...) -> its newest transaction

    def is_own(self, account: Account, place: Place) -> bool:
        """Whether this was the agent's owner at a place in the chain, or had been its wallet by then.

        Wallets count for good, or an agent would change its own before bad feedback. Owners count while they own: an
        agent can be given to somebody who never asked for it.
        """
        since = self.wallets.get(account)
        owner = next((owner for since, owner in reversed(self.owners) if since < place), None)
        return (since is not None and since < place) or owner == account


class AgentView:
    """The agents of one registry."""

    def __init__(self, queries: Queries, source: str = "identity_registry") -> None:
        self._queries, self._source = queries, source

    def agent(self, number: int) -> Agent | None:
        return self.some([number]).get(number)

    def some(self, numbers: Sequence[int]) -> dict[int, Agent]:
        """Those of these agents that are registered."""
        histories = self._queries.histories(self._source, [str(number) for number in numbers], _TERMS)
        return {int(item): _agent(history) for item, history in histories.items() if history}

    def agents(self, *, owner: Account | None = None, wallet: Account | None = None, limit: int = 100) -> list[Agent]:
        """Those whose owner and wallet these are now; the newest registered, or given to them, comes first.

        Cost: it looks at all that were ever theirs, one by one, until it has enough.
        """
        kind, account = ("owned", owner) if owner else ("wallet", wallet) if wallet else ("registered", None)
        found: dict[int, Agent] = {}
        last: Fact | None = None
        while len(found) < limit:
            facts = self._queries.facts(self._source, kind, account or "", limit=PAGE, before=last)
            if not facts:
                break
            last = facts[-1]
            for agent in self.some(list(dict.fromkeys(int(fact.item) for fact in facts))).values():
                if owner in (None, agent.owner) and wallet in (None, agent.wallet):
                    found.setdefault(agent.id, agent)
        return list(found.values())[:limit]


def _agent(history: Sequence[Fact]) -> Agent:
    newest = {fact.kind: fact for fact in history}
    wallets: dict[Account, Place] = {}
    for fact in history:
        if fact.kind == "wallet" and fact.account:
            wallets.setdefault(Account(fact.account), fact.place)
    wallet = newest.get("wallet")
    told = {fact.detail["key"]: fact for fact in history if fact.kind == "metadata"}
    return Agent(
        id=int(history[0].item),
        uri=newest["described"].detail["uri"],
        owner=Account(newest["owned"].account),
        wallet=Account(wallet.account) if wallet and wallet.account else None,
        metadata={key: Metadata(bytes.fromhex(f.detail["value"][2:]), f.tx_hash) for key, f in told.items()},
        wallets=wallets,
        owners=[(fact.place, Account(fact.account)) for fact in history if fact.kind == "owned"],
        registered_at=newest["registered"].time,
        proofs={kind: fact.tx_hash for kind, fact in newest.items()},
    )
