"""What a reputation registry says (ERC-8004; contracts/reputation_registry.vy): feedback on agents, and answers to it.

Our own registry takes feedback only for a completed job. The one that public chains have takes it from anybody, and
keeps the `endpoint` in its event: `proven` counts there what ours would have taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from tessera.chain.agents import proven_job
from tessera.chain.faces import ReputationRegistry
from tessera.chain.indexer.facts import Fact, Place, Reducer, Said, Value, item_id
from tessera.chain.indexer.identity_registry import Agent
from tessera.chain.indexer.job_escrow import Job
from tessera.chain.indexer.queries import Queries
from tessera.core.ids import Account
from tessera.incentives.escrow_twin import JobStatus

__all__ = ["REPUTATION_REGISTRY", "Answer", "Feedback", "ReputationView", "proven"]

_ALL = 1_000_000


def _key(agent: int, client: Account, index: int) -> str:
    return f"{agent}/{client}/{index}"


def _given(event: ReputationRegistry.NewFeedback) -> Iterator[Said]:
    key = _key(event.agentId, event.clientAddress, event.feedbackIndex)
    detail: dict[str, Value] = {
        "value": event.value,
        "decimals": event.valueDecimals,
        "tag1": event.tag1,
        "tag2": event.tag2,
        "endpoint": event.endpoint,
        "uri": event.feedbackURI,
        "hash": item_id(event.feedbackHash),
    }
    yield Said("given", event.clientAddress, key, detail=detail)
    yield Said("rated", event.clientAddress, item_id(event.agentId), detail={"feedback": key})
    job = proven_job(event.endpoint)
    if job is not None:
        yield Said("named", event.clientAddress, f"job {job}", detail={"feedback": key})


def _revoked(event: ReputationRegistry.FeedbackRevoked) -> Iterator[Said]:
    yield Said("revoked", event.clientAddress, _key(event.agentId, event.clientAddress, event.feedbackIndex))


def _answered(event: ReputationRegistry.ResponseAppended) -> Iterator[Said]:
    key = _key(event.agentId, event.clientAddress, event.feedbackIndex)
    detail: dict[str, Value] = {"uri": event.responseURI, "hash": item_id(event.responseHash)}
    yield Said("answered", event.responder, key, detail=detail)


REPUTATION_REGISTRY = Reducer(
    "reputation_registry",
    says={
        ReputationRegistry.NewFeedback: _given,
        ReputationRegistry.FeedbackRevoked: _revoked,
        ReputationRegistry.ResponseAppended: _answered,
    },
)


@dataclass(frozen=True, slots=True)
class Answer:
    """Somebody's answer to a feedback."""

    responder: Account
    uri: str
    hash: str  # 0x and 64 hex digits
    time: int  # seconds since 1970
    tx_hash: str


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a client said of an agent, once."""

    agent: int
    client: Account
    index: int  # from 1, by agent and client
    value: int  # with `decimals` digits behind the point
    decimals: int
    tag1: str
    tag2: str
    endpoint: str
    job: int | None  # that `endpoint` names
    uri: str
    hash: str  # 0x and 64 hex digits
    revoked: str  # the transaction that took it back; empty while it stands
    answers: tuple[Answer, ...]  # the oldest first
    place: Place
    time: int  # seconds since 1970
    tx_hash: str

    @property
    def score(self) -> Fraction:
        return Fraction(self.value, 10**self.decimals)


class ReputationView:
    """The feedback in one registry."""

    def __init__(self, queries: Queries, source: str = "reputation_registry") -> None:
        self._queries, self._source = queries, source

    def feedback(self, agent: int | None = None, client: Account | None = None, *, limit: int = 100) -> list[Feedback]:
        """On an agent, by a client, or both; the newest first, revoked ones among it."""
        item = "" if agent is None else str(agent)
        facts = self._queries.facts(self._source, "rated", client or "", item, limit=limit)
        return self._feedback([fact.detail["feedback"] for fact in facts])

    def naming(self, job: int) -> list[Feedback]:
        """On any agent, whose endpoint names this job; the newest first."""
        facts = self._queries.facts(self._source, "named", item=f"job {job}", limit=_ALL)
        return self._feedback([fact.detail["feedback"] for fact in facts])

    def _feedback(self, keys: Sequence[str]) -> list[Feedback]:
        histories = self._queries.histories(self._source, keys)
        return [_feedback(history) for history in histories.values() if history]


def proven(feedback: Iterable[Feedback], agents: Mapping[int, Agent], jobs: Mapping[int, Job]) -> list[Feedback]:
    """What counts of some feedback: each names a completed job of its client's that the agent has done.

    The agent has done it when, at the time of the feedback, the job's provider owned the agent or had ever been its
    wallet. Such an account does not vote for its agent. Each job votes once, by its client's first feedback on whoever
    has done it, and for good: revoked, it counts nothing and no other takes its place.

    Args:
        feedback: all that names the jobs in question (`ReputationView.naming`), or one job may vote for two agents.
        agents: by number; feedback on others counts nothing.
        jobs: by number, of the escrow that the endpoints mean.

    Returns: the oldest first.
    """
    votes: dict[int, Feedback] = {}
    for one in sorted(feedback, key=lambda one: one.place):
        agent, job = agents.get(one.agent), None if one.job is None else jobs.get(one.job)
        if agent is not None and job is not None and _is_proof(one, agent, job):
            votes.setdefault(job.id, one)
    return [vote for vote in votes.values() if not vote.revoked]


def _is_proof(one: Feedback, agent: Agent, job: Job) -> bool:
    is_done = job.status == JobStatus.COMPLETED and job.provider is not None and agent.is_own(job.provider, one.place)
    return is_done and job.client == one.client and not agent.is_own(one.client, one.place)


def _feedback(history: Sequence[Fact]) -> Feedback:
    given = next(fact for fact in history if fact.kind == "given")
    revoked = next((fact.tx_hash for fact in history if fact.kind == "revoked"), "")
    agent, _, index = given.item.split("/")
    detail = given.detail
    return Feedback(
        agent=int(agent),
        client=Account(given.account),
        index=int(index),
        value=detail["value"],
        decimals=detail["decimals"],
        tag1=detail["tag1"],
        tag2=detail["tag2"],
        endpoint=detail["endpoint"],
        job=proven_job(detail["endpoint"]),
        uri=detail["uri"],
        hash=detail["hash"],
        revoked=revoked,
        answers=tuple(
            Answer(Account(fact.account), fact.detail["uri"], fact.detail["hash"], fact.time, fact.tx_hash)
            for fact in history
            if fact.kind == "answered"
        ),
        place=given.place,
        time=given.time,
        tx_hash=given.tx_hash,
    )
