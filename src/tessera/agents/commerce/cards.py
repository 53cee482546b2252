"""Cards: what an agent offers and where; the registry that holds them, and the feedback that counts.

A card stands in the ERC-8004 identity registry as a `data:` URI, so that finding an agent fetches nothing from anybody.
Invariants: a card is read with limits and counts only for the wallet that the registry says is the agent's; feedback
counts when its job is completed, was paid by whoever gives it and done by the agent, and counts once (`proven`); what a
card says about itself moves no rank.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field

from tessera.agents.commerce.jobs import Jobs
from tessera.chain.agents import job_proof
from tessera.chain.face import decode_events
from tessera.chain.faces import IdentityRegistry, ReputationRegistry
from tessera.chain.indexer.engine import Indexer
from tessera.chain.indexer.identity_registry import IDENTITY_REGISTRY, Agent, AgentView
from tessera.chain.indexer.job_escrow import JOB_ESCROW, Job, JobView
from tessera.chain.indexer.reputation_registry import REPUTATION_REGISTRY, Feedback, ReputationView, proven
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid
from tessera.core.hashing import sha256
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey

__all__ = ["STARS", "Card", "Found", "Registry"]

URI_LIMIT = 2_048  # characters: the registry's own
SERVICES, NAME_LIMIT, TEXT_LIMIT, URL_LIMIT = 16, 60, 300, 300
_PREFIX = "data:application/json;base64,"
MOST_AGENTS = 500  # that one search looks at, the newest first
STARS = 5


@dataclass(frozen=True, slots=True)
class Card:
    """One agent.

    Args:
        account: where it is paid; the registry's wallet.
        services: least price in units by kind of work.
        url: where it takes A2A messages; "" for none.
    """

    name: str
    account: Account
    services: Mapping[str, int]
    about: str = ""
    url: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "account", parse_account(self.account))
        object.__setattr__(self, "services", dict(self.services))
        for text, limit in ((self.name, NAME_LIMIT), (self.about, TEXT_LIMIT), (self.url, URL_LIMIT)):
            if not isinstance(text, str) or len(text) > limit or not text.isprintable():
                raise Invalid(f"a card's texts are single lines of at most {limit} characters")
        if not self.name or len(self.services) > SERVICES:
            raise Invalid(f"a card has a name and at most {SERVICES} services")
        if self.url and not self.url.startswith(("https://", "http://")):
            raise Invalid("a card's URL is http or https")
        for kind, units in self.services.items():
            if not isinstance(kind, str) or not 0 < len(kind) <= NAME_LIMIT or type(units) is not int or units <= 0:
                raise Invalid("a service has a name and a price in units")

    def to_uri(self) -> str:
        """As the registry keeps it."""
        fields = {"name": self.name, "account": self.account, "services": self.services, "about": self.about,
                  "url": self.url}  # fmt: skip
        uri = _PREFIX + base64.b64encode(encoding.encode(fields)).decode()
        if len(uri) > URI_LIMIT:
            raise Invalid(f"this card has {len(uri)} characters as a URI, at most {URI_LIMIT} are kept")
        return uri

    @classmethod
    def from_uri(cls, uri: str) -> Card:
        """Raises: Invalid for anything that `to_uri` does not make."""
        if not uri.startswith(_PREFIX) or len(uri) > URI_LIMIT:
            raise Invalid("a card is a data: URI of canonical JSON")
        try:
            fields = encoding.decode(base64.b64decode(uri.removeprefix(_PREFIX), validate=True), URI_LIMIT)
            return cls(**fields)
        except (binascii.Error, TypeError, AttributeError) as error:
            raise Invalid(f"this is no card: {error}") from error


@dataclass(frozen=True, slots=True)
class Found:
    """An agent that offers what was looked for, with what its paid jobs say."""

    number: int  # in the registry
    card: Card
    votes: int = 0  # jobs that have voted
    clients: int = 0  # different ones among them
    paid: int = 0  # units of the jobs that have voted
    mean: float = 0.0  # stars, weighed by what was paid

    @property
    def rank(self) -> tuple[int, float, int]:
        """More clients who paid first, then what they say, then how much they paid: what costs a ring most to fake."""
        return self.clients, self.mean, self.paid


@dataclass
class Registry:
    """The registries beside one escrow. `refresh` reads on; searches answer from what was read."""

    jobs: Jobs
    identity: IdentityRegistry
    reputation: ReputationRegistry
    _index: Indexer = field(init=False)

    def __post_init__(self) -> None:
        sources = [
            IDENTITY_REGISTRY.at(self.identity.address), REPUTATION_REGISTRY.at(self.reputation.address),
            JOB_ESCROW.at(self.jobs.address),
        ]  # fmt: skip
        self._index = Indexer(None, self.jobs.chain, sources)

    def close(self) -> None:
        self._index.close()

    async def register(self, key: AccountKey, card: Card) -> int:
        """Become an agent with this card, or change the card. Returns: the agent's number."""
        if card.account != key.account:
            raise Invalid(f"the card is {card.account}'s, the key is {key.account}'s")
        await self.refresh()
        mine = AgentView(self._index.queries).agents(owner=key.account, limit=1)
        if mine:
            if mine[0].uri != card.to_uri():
                await self.identity.setAgentURI(key, mine[0].id, card.to_uri())
            return mine[0].id
        receipt = await self.identity.register(key, card.to_uri())
        (made,) = decode_events(IdentityRegistry.Registered, self.identity.address, receipt)
        return made.agentId

    async def rate(self, key: AccountKey, agent: int, job: int, stars: int, why: str = "") -> str:
        """Say how an agent has done a job that this client has paid. The contract refuses all else. A job votes once.

        Returns: the transaction.
        """
        if not 0 <= stars <= STARS:
            raise Invalid(f"0 to {STARS} stars, not {stars}")
        outcome = await self.jobs.outcome(job)
        if outcome is None or outcome.paid == 0:
            raise Conflict(f"job {job} has not paid anybody: there is no receipt to show")
        reason = sha256(why.encode()) if why else bytes(32)
        receipt = await self.reputation.giveFeedback(key, agent, stars, 0, "job", "", job_proof(job), "", reason)
        return receipt.tx_hash

    async def refresh(self) -> None:
        await self._index.update()

    def found(self, number: int) -> Found | None:
        """One agent with what its paid jobs say; None without a card that counts."""
        agents = {agent.id: agent for agent in AgentView(self._index.queries).agents(limit=MOST_AGENTS)}
        card = _card_of(agents[number]) if number in agents else None
        return None if card is None else self._rated(number, card, agents)

    def search(self, kind: str, *, most: int | None = None) -> list[Found]:
        """Agents who offer a kind of work for at most `most` units, the best first."""
        queries = self._index.queries
        agents = {agent.id: agent for agent in AgentView(queries).agents(limit=MOST_AGENTS)}
        found = []
        for agent in agents.values():
            card = _card_of(agent)
            price = None if card is None else card.services.get(kind)
            if card is not None and price is not None and (most is None or price <= most):
                found.append(self._rated(agent.id, card, agents))
        return sorted(found, key=lambda one: (one.rank, -one.number), reverse=True)

    def _rated(self, number: int, card: Card, agents: Mapping[int, Agent]) -> Found:
        queries = self._index.queries
        reputation, view = ReputationView(queries), JobView(queries)
        jobs: dict[int, Job] = {}
        naming: dict[tuple[int, Account, int], Feedback] = {}
        for one in reputation.feedback(agent=number):
            job = None if one.job is None else view.job(one.job)
            if job is not None:
                jobs[job.id] = job
                naming |= {(other.agent, other.client, other.index): other for other in reputation.naming(job.id)}
        counted = [one for one in proven(naming.values(), agents, jobs) if one.agent == number]
        stars = [(min(float(one.score), STARS), jobs[one.job].paid) for one in counted if one.job is not None]
        paid = sum(weight for _, weight in stars)
        mean = sum(star * weight for star, weight in stars) / paid if paid else 0.0
        return Found(number, card, len(counted), len({one.client for one in counted}), paid, mean)


def _card_of(agent: Agent) -> Card | None:
    """The card, if it can be read and is about the account that the registry knows."""
    try:
        card = Card.from_uri(agent.uri)
    except Invalid:
        return None  # somebody else's form, or nonsense
    return card if card.account == agent.wallet else None
