"""What the index tells of agents is what their registries say; feedback counts where a completed job proves it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent_world import AGENT, Agents, agents
from chain_support import CHAIN_ID, NOW, WORKERS
from escrow_world import CLIENT, EVALUATOR, PROVIDER, STRANGER
from index_world import FakeNode, emitted
from tessera.chain.agents import wallet_digest
from tessera.chain.client import RpcChain
from tessera.chain.face import decode_events
from tessera.chain.faces import IdentityRegistry, ReputationRegistry, ValidationRegistry
from tessera.chain.indexer.engine import Indexer
from tessera.chain.indexer.identity_registry import IDENTITY_REGISTRY, Agent, AgentView
from tessera.chain.indexer.job_escrow import JOB_ESCROW, Job, JobView
from tessera.chain.indexer.reputation_registry import REPUTATION_REGISTRY, Feedback, ReputationView, proven
from tessera.chain.indexer.validation_registry import VALIDATION_REGISTRY, ValidationView
from tessera.incentives.escrow_twin import JobStatus

pytestmark = pytest.mark.anyio
WALLET, BUYER = WORKERS[3], STRANGER
HASH, REQUEST, OTHER_REQUEST = b"\x0d" * 32, b"\x0e" * 32, b"\x0f" * 32


@pytest.fixture
async def world() -> Agents:
    return await agents()


async def told_of(world: Agents) -> Indexer:
    sources = [
        IDENTITY_REGISTRY.at(world.identity.address),
        REPUTATION_REGISTRY.at(world.reputation.address),
        VALIDATION_REGISTRY.at(world.validation.address),
        JOB_ESCROW.at(world.jobs.escrow.address),
    ]
    index = Indexer(None, world.chain, sources)
    await index.update()
    return index


async def move_wallet(world: Agents) -> None:
    deadline = NOW + 300
    digest = wallet_digest(CHAIN_ID, world.identity.address, AGENT, WALLET.account, PROVIDER.account, deadline)
    await world.identity.setAgentWallet(PROVIDER, AGENT, WALLET.account, deadline, WALLET.sign_digest(digest))


# --- identity ---------------------------------------------------------------------------------------------------------


async def test_an_agent_is_told_as_the_registry_has_it(world: Agents) -> None:
    await world.identity.setAgentURI(PROVIDER, AGENT, "https://new")
    await world.identity.setMetadata(PROVIDER, AGENT, "model", b"\x01")
    changed = await world.identity.setMetadata(PROVIDER, AGENT, "model", b"\xff\x00")
    await world.identity.setMetadata(PROVIDER, AGENT, "empty", b"")
    await move_wallet(world)
    await world.identity.unsetAgentWallet(PROVIDER, AGENT)
    await move_wallet(world)
    index = await told_of(world)
    agent = AgentView(index.queries).agent(AGENT)
    assert agent is not None
    assert (agent.uri, agent.owner) == (await world.identity.tokenURI(AGENT), await world.identity.ownerOf(AGENT))
    assert agent.wallet == await world.identity.getAgentWallet(AGENT) == WALLET.account
    assert {name: told.value for name, told in agent.metadata.items()} == {"model": b"\xff\x00", "empty": b""}
    assert agent.metadata["model"].tx_hash == changed.tx_hash
    again = await world.chain.receipt(agent.proofs["wallet"])
    assert again is not None
    assert again.block_number == agent.wallets[WALLET.account][0] + 2  # it has been its wallet since the first time
    receipt = await world.chain.receipt(agent.proofs["described"])
    assert receipt is not None
    (updated,) = decode_events(IdentityRegistry.URIUpdated, world.identity.address, receipt)
    assert updated.newURI == agent.uri
    assert AgentView(index.queries).agent(7) is None
    index.close()


async def test_agents_are_found_by_present_owner_and_wallet(world: Agents) -> None:
    await world.identity.register(CLIENT, "https://one")
    await world.identity.register(PROVIDER)
    await world.identity.transferFrom(PROVIDER, PROVIDER.account, BUYER.account, AGENT)
    index = await told_of(world)
    view = AgentView(index.queries)
    assert [agent.id for agent in view.agents()] == [2, 1, 0]
    assert [agent.id for agent in view.agents(owner=PROVIDER.account)] == [2]
    assert [agent.id for agent in view.agents(wallet=PROVIDER.account)] == [2]
    (sold,) = view.agents(owner=BUYER.account)
    assert (sold.id, sold.owner, sold.wallet) == (AGENT, BUYER.account, None)  # nobody is paid at the old wallet
    assert set(sold.wallets) == {PROVIDER.account}
    assert [owner for _, owner in sold.owners] == [PROVIDER.account, BUYER.account]
    assert view.agents(owner=EVALUATOR.account) == []
    assert view.agents(wallet=BUYER.account) == []
    index.close()


# --- validation -------------------------------------------------------------------------------------------------------


async def test_validations_are_told_with_every_answer(world: Agents) -> None:
    await world.identity.register(CLIENT)
    await world.validation.validationRequest(PROVIDER, EVALUATOR.account, AGENT, "ipfs://work", REQUEST)
    await world.validation.validationRequest(CLIENT, EVALUATOR.account, 1, "ipfs://other", OTHER_REQUEST)
    await world.validation.validationResponse(EVALUATOR, REQUEST, 40, "ipfs://first", HASH, "slow")
    await world.validation.validationResponse(EVALUATOR, REQUEST, 100, "", bytes(32), "")
    index = await told_of(world)
    view = ValidationView(index.queries)
    (told,) = view.validations(AGENT)
    assert (told.agent, told.validator, told.uri) == (AGENT, EVALUATOR.account, "ipfs://work")
    assert [(r.value, r.tag, r.uri, r.hash) for r in told.responses] == [
        (40, "slow", "ipfs://first", "0x" + HASH.hex()),
        (100, "", "", "0x" + "00" * 32),
    ]
    stored = await world.validation.getValidationStatus(REQUEST)
    assert (stored[0], stored[2], stored[5]) == (told.validator, told.responses[-1].value, told.responses[-1].time)
    receipt = await world.chain.receipt(told.responses[0].tx_hash)
    assert receipt is not None
    (answer,) = decode_events(ValidationRegistry.ValidationResponse, world.validation.address, receipt)
    assert (answer.response, answer.requestHash) == (40, REQUEST)
    assert [v.request for v in view.validations(validator=EVALUATOR.account)] == [
        "0x" + OTHER_REQUEST.hex(),
        "0x" + REQUEST.hex(),
    ]
    assert view.validation(told.request) == told
    assert view.validation("0x" + HASH.hex()) is None
    assert view.validations(validator=CLIENT.account) == []
    index.close()


# --- reputation -------------------------------------------------------------------------------------------------------


async def test_feedback_is_told_with_its_job_and_answers_and_says_when_it_was_taken_back(world: Agents) -> None:
    jobs = [await world.done() for _ in range(2)]
    first = await world.rate(-5, jobs[0], decimals=1, tag="speed")
    await world.rate(90, jobs[1])
    revoked = await world.reputation.revokeFeedback(CLIENT, AGENT, 2)
    await world.reputation.appendResponse(PROVIDER, AGENT, CLIENT.account, 1, "ipfs://refund", HASH)
    index = await told_of(world)
    view = ReputationView(index.queries)
    second_told, told = view.feedback(AGENT)
    value, decimals, tag1, tag2, _ = await world.reputation.readFeedback(AGENT, CLIENT.account, 1)
    assert (value, decimals, tag1, tag2) == (-5, 1, "speed", "second")
    assert (told.value, told.decimals, told.tag1, told.tag2) == (value, decimals, tag1, tag2)
    assert (told.agent, told.client, told.index, told.job) == (AGENT, CLIENT.account, 1, jobs[0])
    assert (told.revoked, told.tx_hash, told.uri, float(told.score)) == ("", first.tx_hash, "ipfs://why", -0.5)
    assert [(a.responder, a.uri, a.hash) for a in told.answers] == [
        (PROVIDER.account, "ipfs://refund", "0x" + HASH.hex())
    ]
    assert (second_told.index, second_told.revoked, second_told.answers) == (2, revoked.tx_hash, ())
    assert view.feedback(client=CLIENT.account, limit=1) == [second_told]
    assert view.feedback(AGENT, STRANGER.account) == []
    assert view.feedback(1) == []
    assert view.naming(jobs[0]) == [told]
    assert view.naming(99) == []
    index.close()


async def test_all_that_our_registry_has_taken_is_proven_and_what_was_taken_back_is_not(world: Agents) -> None:
    jobs = [await world.done() for _ in range(2)]
    await world.rate(80, jobs[0])
    await world.reputation.revokeFeedback(CLIENT, AGENT, 1)
    await world.identity.transferFrom(PROVIDER, PROVIDER.account, BUYER.account, AGENT)
    await world.rate(70, jobs[1])  # its wallet was PROVIDER's once
    index = await told_of(world)
    told = ReputationView(index.queries).feedback(AGENT)
    agent, escrow = AgentView(index.queries).some([AGENT]), JobView(index.queries)
    found = [escrow.job(feedback.job) for feedback in told if feedback.job is not None]
    counted = proven(told, agent, {job.id: job for job in found if job is not None})
    assert [feedback.job for feedback in counted] == jobs[1:]
    count, mean, _ = await world.reputation.getSummary(AGENT, [CLIENT.account], "", "")
    assert (len(counted), sum(f.score for f in counted) / len(counted)) == (count, mean)
    index.close()


def some_agent(number: int = AGENT, **changed: object) -> Agent:
    since = (5, 0, "identity_registry", 0)
    owner = PROVIDER.account
    made = Agent(number, "", owner, owner, {}, {owner: since}, [(since, owner)], NOW, {})
    return replace(made, **changed)  # type: ignore[arg-type]


def some_job(number: int = 17, **changed: object) -> Job:
    made = Job(
        number, CLIENT.account, PROVIDER.account, EVALUATOR.account, JobStatus.COMPLETED, 10, 10, 0, 0, 0, 0, NOW, "",
        "", {},
    )  # fmt: skip
    return replace(made, **changed)  # type: ignore[arg-type]


def word(block: int = 10, job: int | None = 17, **changed: object) -> Feedback:
    made = Feedback(
        AGENT, CLIENT.account, 1, 80, 0, "", "", f"job:{job}", job, "", "", "", (),
        (block, 0, "reputation_registry", 0), NOW, "0x00",
    )  # fmt: skip
    return replace(made, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "agent", "job"),
    [
        (word(job=None), some_agent(), some_job()),
        (word(job=18), some_agent(), some_job()),
        (word(agent=9), some_agent(), some_job()),
        (word(client=STRANGER.account), some_agent(), some_job()),
        (word(), some_agent(), some_job(provider=None)),
        (word(), some_agent(), some_job(provider=STRANGER.account)),
        (word(block=4), some_agent(), some_job()),
        (word(client=PROVIDER.account), some_agent(), some_job(client=PROVIDER.account)),
        (word(revoked="0x01"), some_agent(), some_job()),
        *[(word(), some_agent(), some_job(status=status)) for status in JobStatus if status != JobStatus.COMPLETED],
    ],
    ids=["no job", "unknown job", "unknown agent", "not the client", "nobody's job", "another's job",
         "before it was the agent's", "of itself", "revoked", *(s.name for s in JobStatus if s != JobStatus.COMPLETED)],
)  # fmt: skip
def test_feedback_without_its_job_counts_nothing(said: Feedback, agent: Agent, job: Job) -> None:
    assert proven([word()], {AGENT: some_agent()}, {17: some_job()}) == [word()]
    assert proven([said], {AGENT: agent}, {17: job}) == []


def test_a_wallet_answers_for_its_jobs_for_good_and_an_owner_while_he_owns() -> None:
    def place(block: int) -> tuple[int, int, str, int]:
        return (block, 0, "identity_registry", 0)

    sold = some_agent(
        wallets={WALLET.account: place(5)}, owners=[(place(5), PROVIDER.account), (place(20), BUYER.account)]
    )
    for account, counting in [(WALLET.account, [10, 30]), (PROVIDER.account, [10]), (BUYER.account, [30])]:
        for block in (10, 30):
            said, job = word(block), {17: some_job(provider=account)}
            assert proven([said], {AGENT: sold}, job) == [said] * (block in counting), (account, block)


def test_a_job_votes_once_by_the_first_word_of_its_client() -> None:
    known = {AGENT: some_agent(), 1: some_agent(1)}
    strangers, first = word(block=8, client=STRANGER.account), word(block=10)
    again, elsewhere = word(block=11, index=2), word(block=12, agent=1)
    assert proven([elsewhere, again, first, strangers], known, {17: some_job()}) == [first]
    taken_back = replace(first, revoked="0x01")
    assert proven([again, taken_back, elsewhere], known, {17: some_job()}) == []


async def test_what_a_public_registry_takes_without_a_proof_is_told_and_does_not_count() -> None:
    """It takes any endpoint, and texts that are no UTF-8: nobody stops an index with one."""
    address, node = WALLET.account, FakeNode()
    texts = ["job:17", "job:017", "job:\N{ARABIC-INDIC DIGIT ONE}", "job:17\n", "https://a", "Job:17"]
    texts.append("job:" + "9" * 21)
    for number, endpoint in enumerate(texts, 1):
        fields = (AGENT, CLIENT.account, number, 80, 0, bytes(32), "tag", "", endpoint, "", bytes(32))
        node.mine(emitted(ReputationRegistry.NewFeedback, address, *fields))
    fields = (AGENT, CLIENT.account, len(texts) + 1, 80, 0, bytes(32), "tag", "", "BROKEN", "", bytes(32))
    broken = emitted(ReputationRegistry.NewFeedback, address, *fields)
    node.mine({**broken, "data": broken["data"].replace(b"BROKEN".hex(), b"job:\xff\xfe".hex())})
    index = Indexer(None, RpcChain(node), [REPUTATION_REGISTRY.at(address)])
    await index.update()
    told = ReputationView(index.queries).feedback(AGENT)
    assert [(f.endpoint, f.job) for f in reversed(told)] == [
        *zip(texts, [17, 17, None, None, None, None, None], strict=True),
        ("job:\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}", None),
    ]
    agent = some_agent(owners=[((0, 0, "identity_registry", 0), PROVIDER.account)])
    assert [f.index for f in proven(told, {AGENT: agent}, {17: some_job()})] == [1]
    assert len(ReputationView(index.queries).naming(17)) == 2
    index.close()
