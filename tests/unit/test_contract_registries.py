"""The agents' registries as they ship, on a chain: the deployed contracts' ABI, and everything that they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from agent_world import AGENT, Agents, agents
from chain_support import CHAIN_ID, NOW, ROOT, WORKERS
from escrow_world import CLIENT, EVALUATOR, PROVIDER, REASON, STRANGER, FastEscrow, compiled, deploy_code
from fast_evm import Reverted
from tessera.chain import artifact
from tessera.chain.agents import job_proof, wallet_digest
from tessera.chain.consent import NOBODY
from tessera.chain.face import decode_events
from tessera.chain.faces import IdentityRegistry, ReputationRegistry, ValidationRegistry
from tessera.core.errors import Conflict, Invalid, Late, Missing, Refused
from tessera.core.hashing import keccak

pytestmark = pytest.mark.anyio
OTHER = WORKERS[3]
HASH = b"\x0d" * 32


@pytest.fixture
async def world() -> Agents:
    return await agents()


def abi_type(item: dict[str, Any]) -> str:
    kind: str = item["type"]
    if not kind.startswith("tuple"):
        return kind
    return f"({','.join(abi_type(part) for part in item['components'])}){kind[5:]}"


@pytest.mark.parametrize("name", ["identity_registry", "reputation_registry", "validation_registry"])
async def test_the_abi_is_that_of_the_deployed_registry(name: str) -> None:
    """All but its owner's and its upgrades' calls. The list is from erc-8004-contracts' abis, as of August 2026."""
    theirs = json.loads((ROOT / "tests/unit/erc8004_abi.json").read_text("utf-8"))[name]
    ours = set()
    for entry in artifact.load(name).abi:
        if entry["type"] == "function":
            outputs = ",".join(abi_type(item) for item in entry["outputs"])
            ours.add(f"{entry['name']}({','.join(abi_type(i) for i in entry['inputs'])}) {outputs}".strip())
        if entry["type"] == "event":
            fields = [abi_type(item) + " indexed" * item["indexed"] for item in entry["inputs"]]
            ours.add(f"event {entry['name']}({','.join(fields)})")
    assert set(theirs) <= ours


# --- identity ---------------------------------------------------------------------------------------------------------


async def test_an_agent_registers_in_three_ways(world: Agents) -> None:
    await world.identity.register(CLIENT)
    await world.identity.register(CLIENT, "https://two")
    receipt = await world.identity.register(CLIENT, "https://three", [("model", b"\x01\x02"), ("empty", b"")])
    (registered,) = decode_events(IdentityRegistry.Registered, world.identity.address, receipt)
    assert (registered.agentId, registered.agentURI, registered.owner) == (3, "https://three", CLIENT.account)
    told = decode_events(IdentityRegistry.MetadataSet, world.identity.address, receipt)
    assert [(event.metadataKey, event.indexedMetadataKey) for event in told] == [
        (name, keccak(name.encode())) for name in ("agentWallet", "model", "empty")
    ]
    assert [await world.identity.tokenURI(number) for number in range(4)] == [
        "ipfs://agent", "", "https://two", "https://three",
    ]  # fmt: skip
    assert await world.identity.getMetadata(3, "model") == b"\x01\x02"
    assert bytes.fromhex(CLIENT.account[2:]) == await world.identity.getMetadata(3, "agentWallet")
    assert await world.identity.balanceOf(CLIENT.account) == 3
    assert await world.identity.ownerOf(AGENT) == await world.identity.getAgentWallet(AGENT) == PROVIDER.account


async def test_an_agent_says_more_about_itself(world: Agents) -> None:
    receipt = await world.identity.setAgentURI(PROVIDER, AGENT, "https://new")
    (updated,) = decode_events(IdentityRegistry.URIUpdated, world.identity.address, receipt)
    assert (updated.agentId, updated.newURI, updated.updatedBy) == (AGENT, "https://new", PROVIDER.account)
    await world.identity.setMetadata(PROVIDER, AGENT, "a", b"b")
    assert (await world.identity.tokenURI(AGENT), await world.identity.getMetadata(AGENT, "a")) == ("https://new", b"b")
    with pytest.raises(Invalid, match="reserved key"):
        await world.identity.setMetadata(PROVIDER, AGENT, "agentWallet", b"b")
    with pytest.raises(Invalid, match="reserved key"):
        await world.identity.register(PROVIDER, "x", [("agentWallet", b"b")])


async def test_a_wallet_agrees_by_its_signature(world: Agents) -> None:
    deadline = NOW + 300
    digest = wallet_digest(CHAIN_ID, world.identity.address, AGENT, OTHER.account, PROVIDER.account, deadline)
    assert digest == await world.identity.wallet_digest(AGENT, OTHER.account, deadline)
    fields = [("agentId", "uint256"), ("newWallet", "address"), ("owner", "address"), ("deadline", "uint256")]
    values = (AGENT, OTHER.account, PROVIDER.account, deadline)
    signable = encode_typed_data(
        {"name": "ERC8004IdentityRegistry", "version": "1", "chainId": CHAIN_ID,
         "verifyingContract": world.identity.address},
        {"AgentWalletSet": [{"name": name, "type": kind} for name, kind in fields]},
        {name: value for (name, _), value in zip(fields, values, strict=True)},
    )  # fmt: skip
    assert bytes(EthAccount.sign_message(signable, OTHER.secret).message_hash) == digest
    await world.identity.setAgentWallet(PROVIDER, AGENT, OTHER.account, deadline, OTHER.sign_digest(digest))
    assert await world.identity.getAgentWallet(AGENT) == OTHER.account
    assert await world.identity.was_wallet(AGENT, PROVIDER.account)
    await world.identity.unsetAgentWallet(PROVIDER, AGENT)
    assert await world.identity.getAgentWallet(AGENT) == NOBODY
    assert await world.identity.getMetadata(AGENT, "agentWallet") == b""
    assert await world.identity.was_wallet(AGENT, OTHER.account)


async def test_a_wallet_that_has_not_agreed_is_not_set(world: Agents) -> None:
    identity, deadline = world.identity, NOW + 300
    digest = wallet_digest(CHAIN_ID, identity.address, AGENT, OTHER.account, PROVIDER.account, deadline)
    signed = OTHER.sign_digest(digest)
    for wallet, until, signature in [
        (OTHER.account, deadline, PROVIDER.sign_digest(digest)),
        (OTHER.account, deadline - 1, signed),
        (STRANGER.account, deadline, signed),
        (OTHER.account, deadline, signed[:64]),
    ]:
        with pytest.raises(Invalid, match="not the wallet's signature"):
            await identity.setAgentWallet(PROVIDER, AGENT, wallet, until, signature)
    with pytest.raises(Invalid, match="bad wallet"):
        await identity.setAgentWallet(PROVIDER, AGENT, NOBODY, deadline, signed)
    with pytest.raises(Late, match="signature expired"):
        await identity.setAgentWallet(PROVIDER, AGENT, OTHER.account, NOW - 1, signed)
    with pytest.raises(Invalid, match="deadline too far"):
        await identity.setAgentWallet(PROVIDER, AGENT, OTHER.account, NOW + 301, signed)
    with pytest.raises(Refused, match="not authorized"):
        await identity.setAgentWallet(OTHER, AGENT, OTHER.account, deadline, signed)


async def test_a_contract_is_a_wallet_and_holds_agents(world: Agents) -> None:
    good, bad = [await deploy_code(world.chain, compiled(SMART % answer)) for answer in ("0x1626ba7e", "0xffffffff")]
    await world.identity.setAgentWallet(PROVIDER, AGENT, good, NOW + 9, b"anything")
    assert await world.identity.getAgentWallet(AGENT) == good
    with pytest.raises(Invalid, match="not the wallet's signature"):
        await world.identity.setAgentWallet(PROVIDER, AGENT, bad, NOW + 9, b"anything")
    with pytest.raises(Refused, match="receiver refused"):
        await world.identity.safeTransferFrom(PROVIDER, PROVIDER.account, bad, AGENT)
    await world.identity.safeTransferFrom(PROVIDER, PROVIDER.account, good, AGENT, b"data")
    assert await world.identity.ownerOf(AGENT) == good


SMART = """
# pragma version 0.4.3
ANSWER: constant(bytes4) = %s

@external
@view
def isValidSignature(digest: bytes32, signature: Bytes[1024]) -> bytes4:
    return ANSWER

@external
def onERC721Received(operator: address, sender: address, id: uint256, data: Bytes[1024]) -> bytes4:
    return 0x150b7a02 if ANSWER == 0x1626ba7e else 0x00000000
"""


async def test_a_new_owner_is_not_paid_at_the_old_ones_wallet(world: Agents) -> None:
    await world.identity.approve(PROVIDER, OTHER.account, AGENT)
    assert await world.identity.getApproved(AGENT) == OTHER.account
    await world.identity.transferFrom(OTHER, PROVIDER.account, CLIENT.account, AGENT)
    assert await world.identity.ownerOf(AGENT) == CLIENT.account
    assert (await world.identity.getAgentWallet(AGENT), await world.identity.getApproved(AGENT)) == (NOBODY, NOBODY)
    with pytest.raises(Refused, match="not authorized"):
        await world.identity.setAgentURI(PROVIDER, AGENT, "mine still")


async def test_an_operator_acts_for_all_agents(world: Agents) -> None:
    await world.identity.setApprovalForAll(PROVIDER, OTHER.account, True)
    assert await world.identity.isAuthorizedOrOwner(OTHER.account, AGENT)
    await world.identity.approve(OTHER, STRANGER.account, AGENT)
    await world.identity.setApprovalForAll(PROVIDER, OTHER.account, False)
    assert not await world.identity.isAuthorizedOrOwner(OTHER.account, AGENT)


async def test_nobody_takes_anothers_agent(world: Agents) -> None:
    identity = world.identity
    for attempt in (
        identity.transferFrom(OTHER, PROVIDER.account, OTHER.account, AGENT),
        identity.approve(OTHER, OTHER.account, AGENT),
        identity.setMetadata(OTHER, AGENT, "a", b""),
        identity.unsetAgentWallet(OTHER, AGENT),
    ):
        with pytest.raises(Refused, match="not authorized"):
            await attempt
    with pytest.raises(Refused, match="not the owner"):
        await identity.transferFrom(PROVIDER, OTHER.account, CLIENT.account, AGENT)
    with pytest.raises(Invalid, match="bad receiver"):
        await identity.transferFrom(PROVIDER, PROVIDER.account, NOBODY, AGENT)
    with pytest.raises(Invalid, match="bad operator"):
        await identity.setApprovalForAll(PROVIDER, NOBODY, True)
    with pytest.raises(Missing, match="no such agent"):
        await identity.ownerOf(7)
    with pytest.raises(Invalid, match="nobody's balance"):
        await identity.balanceOf(NOBODY)
    assert await identity.supportsInterface(bytes.fromhex("80ac58cd"))
    assert not await identity.supportsInterface(b"\xff" * 4)
    assert (await identity.eip712Domain())[1:5] == ("ERC8004IdentityRegistry", "1", CHAIN_ID, identity.address)


# --- reputation -------------------------------------------------------------------------------------------------------


async def test_the_client_of_a_completed_job_says_how_it_was(world: Agents) -> None:
    receipt = await world.rate(87, await world.done(), decimals=1, tag="quality")
    (said,) = decode_events(ReputationRegistry.NewFeedback, world.reputation.address, receipt)
    assert (said.agentId, said.clientAddress, said.feedbackIndex) == (AGENT, CLIENT.account, 1)
    assert (said.value, said.valueDecimals, said.endpoint) == (87, 1, "job:1")
    assert (said.tag1, said.indexedTag1) == ("quality", keccak(b"quality"))
    assert await world.reputation.readFeedback(AGENT, CLIENT.account, 1) == (87, 1, "quality", "second", False)
    assert await world.reputation.getLastIndex(AGENT, CLIENT.account) == 1
    assert await world.reputation.getClients(AGENT) == [CLIENT.account]


async def test_a_job_votes_once(world: Agents) -> None:
    job = await world.done()
    await world.rate(5, job)
    with pytest.raises(Conflict, match="job has voted"):
        await world.rate(5, job)
    await world.reputation.revokeFeedback(CLIENT, AGENT, 1)
    with pytest.raises(Conflict, match="job has voted"):
        await world.rate(5, job)


async def test_feedback_needs_a_job_that_was_done(world: Agents) -> None:
    rejected, waiting = await world.jobs.submitted(10), await world.jobs.submitted(10)
    await world.jobs.escrow.reject(EVALUATOR, rejected, REASON)
    for job in (rejected, waiting):
        with pytest.raises(Refused, match="job not completed"):
            await world.rate(1, job)
    done = await world.done()
    with pytest.raises(Refused, match="not the job's client"):
        await world.rate(1, done, client=STRANGER)
    await world.identity.register(OTHER)
    with pytest.raises(Refused, match="not the agent's job"):
        await world.rate(1, done, agent=1)
    with pytest.raises(Missing, match="no such job"):
        await world.rate(1, 99)
    for endpoint in ("", "job:", "job:x", "https://agent/api", "jobs:1", "job:-1", "job:" + "1" * 21):
        with pytest.raises(Invalid, match="no job in endpoint"):
            await world.reputation.giveFeedback(CLIENT, AGENT, 1, 0, "", "", endpoint, "", HASH)
    with pytest.raises(Invalid, match="number is between"):
        job_proof(0)


async def test_feedback_has_bounds(world: Agents) -> None:
    job = await world.done()
    with pytest.raises(Invalid, match="too many decimals"):
        await world.rate(1, job, decimals=19)
    for value in (10**38 + 1, -(10**38) - 1):
        with pytest.raises(Invalid, match="value too large"):
            await world.rate(value, job)
    await world.rate(-(10**38), job, decimals=18)


async def test_an_agent_does_not_escape_by_another_wallet(world: Agents) -> None:
    """The job was its old wallet's, and the agent has changed both wallet and owner since."""
    job = await world.done()
    await world.identity.transferFrom(PROVIDER, PROVIDER.account, OTHER.account, AGENT)
    await world.rate(-1, job)
    assert await world.reputation.getSummary(AGENT, [CLIENT.account], "", "") == (1, -1, 0)


async def test_a_summary_is_over_the_clients_that_the_reader_trusts(world: Agents) -> None:
    for value, decimals, tag in ((80, 0, "a"), (905, 1, "a"), (-10, 0, "b")):
        await world.rate(value, await world.done(), decimals=decimals, tag=tag)
    summary = world.reputation.getSummary
    assert await summary(AGENT, [CLIENT.account], "", "") == (3, 53, 0)  # (80 + 90.5 - 10) / 3 = 53.5
    assert await summary(AGENT, [CLIENT.account], "a", "second") == (2, 85, 0)
    assert await summary(AGENT, [CLIENT.account], "a", "third") == (0, 0, 0)
    assert await summary(AGENT, [STRANGER.account], "", "") == (0, 0, 0)
    await world.reputation.revokeFeedback(CLIENT, AGENT, 3)
    assert await summary(AGENT, [CLIENT.account], "b", "") == (0, 0, 0)
    with pytest.raises(Invalid, match="clients required"):
        await summary(AGENT, [], "", "")
    clients, indexes, values, *_, revoked = await world.reputation.readAllFeedback(AGENT, [], "", "", True)
    assert (clients, indexes, values) == ([CLIENT.account] * 3, [1, 2, 3], [80, 905, -10])
    assert revoked == [False, False, True]
    assert (await world.reputation.readAllFeedback(AGENT, [CLIENT.account], "", "", False))[2] == [80, 905]


async def test_an_agent_does_not_rate_itself(world: Agents) -> None:
    with pytest.raises(Refused, match="self-feedback"):
        await world.rate(100, await world.done(), client=PROVIDER)


@pytest.mark.slow
async def test_a_page_of_feedback_is_whole_or_refused() -> None:
    """65 words are one too many: a page that leaves some out would look like all."""
    world = FastEscrow()
    evm, client = world.evm, CLIENT.account
    identity = evm.deploy(client, "identity_registry")
    reputation = evm.deploy(client, "reputation_registry", identity, world.escrow)
    evm.send(PROVIDER.account, identity, "register()")
    give = "giveFeedback(uint256,int128,uint8,string,string,string,string,bytes32)"
    read = "readAllFeedback(uint256,address[],string,string,bool)"
    for number in range(1, 66):
        world.complete(world.submitted(1))
        evm.send(
            client, reputation, give, AGENT, number, 0, "odd" if number % 2 else "even", "", f"job:{number}", "", HASH
        )
        if number == 64:
            evm.send(client, reputation, read, AGENT, [client], "", "", False)
    with pytest.raises(Reverted, match="too many, name fewer clients"):
        evm.send(client, reputation, read, AGENT, [client], "", "", False)
    evm.send(client, reputation, read, AGENT, [client], "odd", "", False)


async def test_anybody_answers_to_feedback(world: Agents) -> None:
    await world.rate(1, await world.done())
    reputation = world.reputation
    for responder in (PROVIDER, PROVIDER, STRANGER):
        await reputation.appendResponse(responder, AGENT, CLIENT.account, 1, "ipfs://answer", HASH)
    assert await reputation.getResponseCount(AGENT, CLIENT.account, 1, []) == 3
    assert await reputation.getResponseCount(AGENT, CLIENT.account, 0, [PROVIDER.account]) == 2
    assert await reputation.getResponseCount(AGENT, NOBODY, 0, []) == 3
    assert await reputation.getResponseCount(AGENT, STRANGER.account, 0, []) == 0
    with pytest.raises(Invalid, match="empty response"):
        await reputation.appendResponse(STRANGER, AGENT, CLIENT.account, 1, "", HASH)
    for attempt in (
        reputation.appendResponse(STRANGER, AGENT, CLIENT.account, 2, "x", HASH),
        reputation.revokeFeedback(CLIENT, AGENT, 0),
        reputation.readFeedback(AGENT, CLIENT.account, 2),
    ):
        with pytest.raises(Missing, match="no such feedback"):
            await attempt
    await reputation.revokeFeedback(CLIENT, AGENT, 1)
    with pytest.raises(Conflict, match="revoked already"):
        await reputation.revokeFeedback(CLIENT, AGENT, 1)


async def test_registries_need_each_other(world: Agents) -> None:
    here, nowhere = world.identity.address, STRANGER.account
    with pytest.raises(Invalid, match="identity is no contract"):
        await ReputationRegistry.deploy(world.chain, CLIENT, nowhere, here)
    with pytest.raises(Invalid, match="escrow is no contract"):
        await ReputationRegistry.deploy(world.chain, CLIENT, here, nowhere)
    with pytest.raises(Invalid, match="identity is no contract"):
        await ValidationRegistry.deploy(world.chain, CLIENT, nowhere)
    assert await world.reputation.getIdentityRegistry() == await world.validation.getIdentityRegistry() == here


# --- validation -------------------------------------------------------------------------------------------------------


async def test_a_validator_answers_and_answers_again(world: Agents) -> None:
    validation = world.validation
    await validation.validationRequest(PROVIDER, OTHER.account, AGENT, "ipfs://work", HASH)
    assert await validation.getSummary(AGENT, [], "") == (0, 0)
    await validation.validationResponse(OTHER, HASH, 60, "", bytes(32), "soft")
    receipt = await validation.validationResponse(OTHER, HASH, 95, "ipfs://proof", REASON, "hard")
    (told,) = decode_events(ValidationRegistry.ValidationResponse, validation.address, receipt)
    assert (told.requestHash, told.response, told.tag) == (HASH, 95, "hard")
    status = await validation.getValidationStatus(HASH)
    assert status == (OTHER.account, AGENT, 95, REASON, "hard", NOW)
    await validation.validationRequest(PROVIDER, STRANGER.account, AGENT, "", REASON)
    await validation.validationResponse(STRANGER, REASON, 0, "", bytes(32), "hard")
    assert await validation.getSummary(AGENT, [], "hard") == (2, 47)
    assert await validation.getSummary(AGENT, [OTHER.account], "") == (1, 95)
    assert await validation.getSummary(AGENT, [], "soft") == (0, 0)
    assert await validation.getAgentValidations(AGENT) == [HASH, REASON]
    assert await validation.getValidatorRequests(STRANGER.account) == [REASON]


async def test_nobody_asks_or_answers_for_another(world: Agents) -> None:
    validation = world.validation
    with pytest.raises(Refused, match="not authorized"):
        await validation.validationRequest(OTHER, OTHER.account, AGENT, "", HASH)
    with pytest.raises(Invalid, match="bad validator"):
        await validation.validationRequest(PROVIDER, NOBODY, AGENT, "", HASH)
    with pytest.raises(Missing, match="no such request"):
        await validation.validationResponse(OTHER, HASH, 1, "", HASH, "")
    await validation.validationRequest(PROVIDER, OTHER.account, AGENT, "", HASH)
    with pytest.raises(Conflict, match="asked already"):
        await validation.validationRequest(PROVIDER, STRANGER.account, AGENT, "", HASH)
    with pytest.raises(Refused, match="not the validator"):
        await validation.validationResponse(STRANGER, HASH, 1, "", HASH, "")
    with pytest.raises(Invalid, match="more than 100"):
        await validation.validationResponse(OTHER, HASH, 101, "", HASH, "")
