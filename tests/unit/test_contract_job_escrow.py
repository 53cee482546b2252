"""The job escrow as it ships, on a chain: a job's ways, whom it pays, and everything it refuses."""

from __future__ import annotations

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID, NOW, WORKERS, key, memory_chain
from escrow_world import (
    CLIENT,
    COMPLETED,
    DEADLINE,
    EVALUATOR,
    EXPIRED,
    FUNDED,
    GRACE,
    HOOK,
    OPEN,
    PROVIDER,
    QUIET,
    REASON,
    REJECTED,
    STRANGER,
    SUBMITTED,
    WORK,
    Escrow,
    compiled,
    deploy_code,
    local_escrow,
)  # fmt: skip
from tessera.chain import abi
from tessera.chain.consent import NOBODY
from tessera.chain.face import decode_events
from tessera.chain.faces import Coin, JobEscrow
from tessera.chain.jobs import PAY, REFUND, funding_digest, funding_nonce
from tessera.core.errors import Conflict, Invalid, Late, Missing, PaymentRequired, Refused, TesseraError
from tessera.core.hashing import keccak
from tessera.incentives.escrow_twin import JobStatus

pytestmark = pytest.mark.anyio
STILL = 10**12  # what everybody has at first


@pytest.fixture
async def world() -> Escrow:
    return await local_escrow()


def changes(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in zip(before, after, strict=True))


# --- the way of a job -------------------------------------------------------------------------------------------------


async def test_work_that_is_accepted_is_paid(world: Escrow) -> None:
    job = await world.open(1_000)
    assert await world.status(job) == OPEN
    await world.escrow.fund(CLIENT, job, 1_000)
    assert await world.status(job) == FUNDED
    assert await world.holdings() == (STILL - 1_000, STILL, STILL, 1_000)
    await world.escrow.submit(PROVIDER, job, WORK)
    assert await world.status(job) == SUBMITTED
    receipt = await world.escrow.complete(EVALUATOR, job, REASON)
    assert await world.status(job) == COMPLETED
    assert await world.holdings() == (STILL - 1_000, STILL + 1_000, STILL, 0)
    (completed,) = decode_events(JobEscrow.JobCompleted, world.escrow.address, receipt)
    (released,) = decode_events(JobEscrow.PaymentReleased, world.escrow.address, receipt)
    assert (completed.jobId, completed.evaluator, completed.reason) == (job, EVALUATOR.account, REASON)
    assert (released.jobId, released.provider, released.amount) == (job, PROVIDER.account, 1_000)


async def test_a_job_keeps_its_terms_to_the_bit(world: Escrow) -> None:
    largest, hook = 2**96 - 1, await deploy_code(world.chain, QUIET)
    receipt = await world.escrow.createJob(
        CLIENT, PROVIDER.account, EVALUATOR.account, 2**40 - 1, "All of it", hook, 10_000, largest
    )
    await world.escrow.setBudget(PROVIDER, 1, largest)
    job = await world.escrow.jobs(1)
    assert job == (
        CLIENT.account, PROVIDER.account, EVALUATOR.account, hook, largest, largest, 2**40 - 1, 10_000, OPEN, False,
    )  # fmt: skip
    (created,) = decode_events(JobEscrow.JobCreated, world.escrow.address, receipt)
    (terms,) = decode_events(JobEscrow.JobTerms, world.escrow.address, receipt)
    assert (created.client, created.provider, created.evaluator) == (
        CLIENT.account,
        PROVIDER.account,
        EVALUATOR.account,
    )
    assert (created.jobId, created.expiredAt) == (1, 2**40 - 1)
    assert (terms.description, terms.hook, terms.on_silence, terms.bond) == ("All of it", hook, 10_000, largest)


async def test_the_standards_short_calls_are_there(world: Escrow) -> None:
    """`createJob` with four arguments and with five, as ERC-8183 has them: refund on silence, no bond."""
    await world.escrow.createJob(CLIENT, PROVIDER.account, EVALUATOR.account, DEADLINE, "x")
    await world.escrow.createJob(CLIENT, PROVIDER.account, EVALUATOR.account, DEADLINE, "x", NOBODY)
    await world.escrow.createJob(CLIENT, PROVIDER.account, EVALUATOR.account, DEADLINE, "x", NOBODY, PAY)
    assert await world.escrow.job_count() == 3
    jobs = [await world.escrow.jobs(number) for number in (1, 2, 3)]
    assert jobs[0] == jobs[1]
    assert [(job.on_silence, job.bond, job.hook) for job in jobs] == [(REFUND, 0, NOBODY)] * 2 + [(PAY, 0, NOBODY)]
    assert [int(status) for status in JobStatus] == [OPEN, FUNDED, SUBMITTED, COMPLETED, REJECTED, EXPIRED]


async def test_work_that_is_rejected_is_not_paid(world: Escrow) -> None:
    for job in (await world.funded(700), await world.submitted(300)):
        receipt = await world.escrow.reject(EVALUATOR, job, REASON)
        assert await world.status(job) == REJECTED
        (rejected,) = decode_events(JobEscrow.JobRejected, world.escrow.address, receipt)
        assert (rejected.rejector, rejected.reason) == (EVALUATOR.account, REASON)
    assert await world.holdings() == (STILL, STILL, STILL, 0)


async def test_the_client_takes_an_open_job_back(world: Escrow) -> None:
    job = await world.open(bond=400)
    await world.escrow.reject(CLIENT, job, REASON)
    assert await world.status(job) == REJECTED
    assert await world.holdings() == (STILL, STILL, STILL, 0)  # the evaluator's bond, too


async def test_work_that_never_came_is_refunded_at_the_deadline(world: Escrow) -> None:
    job = await world.funded(1_000, bond=300, on_silence=PAY)
    with pytest.raises(Refused, match="not expired"):
        await world.escrow.claimRefund(STRANGER, job)
    await world.later(DEADLINE - NOW)
    receipt = await world.escrow.claimRefund(STRANGER, job)
    assert await world.status(job) == EXPIRED
    assert await world.holdings() == (STILL, STILL, STILL, 0)  # there was nothing to judge: the bond goes back
    (refunded,) = decode_events(JobEscrow.Refunded, world.escrow.address, receipt)
    assert (refunded.client, refunded.amount) == (CLIENT.account, 1_000)


@pytest.mark.parametrize(
    ("on_silence", "client", "provider"),
    [(REFUND, 1_001, 77), (PAY, 77, 1_001), (2_500, 751 + 19, 250 + 58), (1, 1_001, 77), (9_999, 1 + 76, 1_000 + 1)],
)
async def test_silence_costs_the_evaluator_the_bond(world: Escrow, on_silence: int, client: int, provider: int) -> None:
    """Each gets the part of the bond that it did not get of the budget."""
    before = await world.holdings()
    job = await world.submitted(1_001, bond=77, on_silence=on_silence)
    await world.later(DEADLINE - NOW + GRACE - 1)
    with pytest.raises(Refused, match="not expired"):
        await world.escrow.claimRefund(CLIENT, job)
    await world.later(1)
    receipt = await world.escrow.claimRefund(STRANGER, job)
    assert await world.status(job) == EXPIRED
    assert changes(before, await world.holdings()) == (client - 1_001, provider, -77, 0)
    (slashed,) = decode_events(JobEscrow.EvaluatorSlashed, world.escrow.address, receipt)
    assert (slashed.evaluator, slashed.to_client + slashed.to_provider) == (EVALUATOR.account, 77)


async def test_a_judgement_gives_the_bond_back(world: Escrow) -> None:
    for judge in (world.escrow.complete, world.escrow.reject):
        job = await world.submitted(1_000, bond=300)
        assert (await world.holdings())[2] == STILL - 300
        receipt = await judge(EVALUATOR, job, REASON)
        (returned,) = decode_events(JobEscrow.BondReturned, world.escrow.address, receipt)
        assert (returned.jobId, returned.amount) == (job, 300)
    assert (await world.holdings())[2:] == (STILL, 0)


async def test_the_evaluator_takes_the_bond_of_an_open_job_back(world: Escrow) -> None:
    job = await world.open(bond=300)
    await world.escrow.withdrawBond(EVALUATOR, job)
    assert (await world.holdings())[2:] == (STILL, 0)
    with pytest.raises(Refused, match="no bond here"):
        await world.escrow.withdrawBond(EVALUATOR, job)
    with pytest.raises(Refused, match="no bond here"):
        await world.escrow.fund(CLIENT, job, 1_000)
    await world.escrow.postBond(EVALUATOR, job)
    await world.escrow.fund(CLIENT, job, 1_000)
    with pytest.raises(Conflict, match="not open"):
        await world.escrow.withdrawBond(EVALUATOR, job)


async def test_the_client_may_judge_himself(world: Escrow) -> None:
    job = await world.submitted(500, evaluator=CLIENT.account)
    await world.escrow.complete(CLIENT, job, REASON)
    assert await world.status(job) == COMPLETED


async def test_a_provider_may_come_later(world: Escrow) -> None:
    job = await world.open(provider=None)
    with pytest.raises(Refused, match="no provider"):
        await world.escrow.fund(CLIENT, job, 1_000)
    receipt = await world.escrow.setProvider(CLIENT, job, PROVIDER.account)
    (named,) = decode_events(JobEscrow.ProviderSet, world.escrow.address, receipt)
    assert (named.jobId, named.provider) == (job, PROVIDER.account)
    await world.escrow.fund(CLIENT, job, 1_000)  # the price stands
    await world.escrow.submit(PROVIDER, job, WORK)


async def test_money_of_one_job_never_pays_another(world: Escrow) -> None:
    first, second = await world.submitted(1_000), await world.submitted(5)
    await world.escrow.complete(EVALUATOR, second, REASON)
    assert (await world.holdings())[3] == 1_000
    await world.escrow.complete(EVALUATOR, first, REASON)
    assert (await world.holdings())[3] == 0


# --- funding by signature ---------------------------------------------------------------------------------------------


async def test_a_signature_funds_a_job(world: Escrow) -> None:
    job = await world.open(1_000)
    await world.coin.approve(CLIENT, world.escrow.address, 0)
    await world.escrow.fundWithAuthorization(STRANGER, job, 1_000, *await world.authorization(job))
    assert await world.status(job) == FUNDED
    assert await world.holdings() == (STILL - 1_000, STILL, STILL, 1_000)


async def test_the_funding_digest_is_what_eip_712_says(world: Escrow) -> None:
    job_id = await world.open(1_000, bond=5, on_silence=3)
    job = await world.escrow.jobs(job_id)
    message = {
        "from": CLIENT.account, "to": world.escrow.address, "value": 1_000, "validAfter": 7, "validBefore": 2**33,
        "nonce": funding_nonce(job_id, job),
    }  # fmt: skip
    kinds = ["address", "address", "uint256", "uint256", "uint256", "bytes32"]
    fields = [{"name": name, "type": kind} for name, kind in zip(message, kinds, strict=True)]
    domain = {"name": "Test USD", "version": "2", "chainId": CHAIN_ID, "verifyingContract": world.coin.address}
    signed = EthAccount.sign_message(
        encode_typed_data(domain, {"ReceiveWithAuthorization": fields}, message), CLIENT.secret
    )
    digest = funding_digest(CHAIN_ID, world.coin.address, world.escrow.address, job_id, job, 7, 2**33)
    assert bytes(signed.message_hash) == digest


async def test_nothing_is_signed_for_a_job_without_price_or_provider(world: Escrow) -> None:
    for job_id, what in ((await world.open(0), "budget"), (await world.open(provider=None), "provider")):
        job = await world.escrow.jobs(job_id)
        with pytest.raises(Invalid, match=f"no {what} yet"):
            funding_digest(CHAIN_ID, world.coin.address, world.escrow.address, job_id, job, 0, 1)


async def test_an_asset_that_answers_any_call_funds_nothing(world: Escrow) -> None:
    """A wrapped coin's fallback, for one: it does not know EIP-3009, and does not say so."""
    asset = await deploy_code(world.chain, compiled(ANY_CALL))
    escrow = await JobEscrow.deploy(world.chain, CLIENT, asset, GRACE)
    other = Escrow(world.chain, Coin(world.chain, asset), escrow)
    job = await other.open(10)
    with pytest.raises(Refused, match="nothing arrived"):
        await escrow.fundWithAuthorization(CLIENT, job, 10, 0, 2**40, 27, bytes(32), bytes(32))
    with pytest.raises(Refused, match="transfer failed"):
        await escrow.fund(CLIENT, job, 10)


ANY_CALL = """
# pragma version 0.4.3
@external
@view
def balanceOf(account: address) -> uint256:
    return 3

@external
def transferFrom(payer: address, payee: address, amount: uint256) -> bool:
    return False

@external
def __default__():
    pass
"""


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_hook_hears_of_every_action_but_the_refund(world: Escrow) -> None:
    hook = await deploy_code(world.chain, compiled(HOOK))
    job = await world.open(hook=hook, provider=None)
    await world.escrow.setProvider(CLIENT, job, PROVIDER.account, b"why")
    await world.escrow.fund(CLIENT, job, 1_000, b"more")
    await world.escrow.submit(PROVIDER, job, WORK, b"")
    await world.escrow.complete(EVALUATOR, job, REASON)
    await world.escrow.reject(CLIENT, await world.open(0, hook=hook), REASON)
    late = await world.submitted(hook=hook)
    calls = ["setBudget", "setProvider", "fund", "submit", "complete", "reject", "setBudget", "fund", "submit"]
    expected = [selector(name) for name in calls for _ in ("before", "after")]
    assert await heard(world, hook) == expected
    await world.later(DEADLINE - NOW + GRACE)
    await world.escrow.claimRefund(STRANGER, late)
    assert await heard(world, hook) == expected


def selector(name: str) -> bytes:
    kind = {"setProvider": "address", "setBudget": "uint256", "fund": "uint256"}.get(name, "bytes32")
    return keccak(f"{name}(uint256,{kind},bytes)".encode())[:4]


async def heard(world: Escrow, hook: str) -> list[bytes]:
    found: list[bytes] = []
    for place in range(64):
        try:
            found.append((await world.chain.call(hook, keccak(b"heard(uint256)")[:4] + place.to_bytes(32, "big")))[:4])
        except TesseraError:
            break
    return found


async def test_a_hook_may_refuse_an_open_job_and_nothing_else(world: Escrow) -> None:
    hook = await deploy_code(world.chain, compiled(HOOK))
    job, open_job = await world.open(hook=hook), await world.open(hook=hook, provider=None)
    await set_mode(world, hook, 1)
    for refused in (
        world.escrow.setProvider(CLIENT, open_job, PROVIDER.account),
        world.escrow.setBudget(CLIENT, job, 5),
        world.escrow.fund(CLIENT, job, 1_000),
        world.escrow.fundWithAuthorization(STRANGER, job, 1_000, *await world.authorization(job)),
    ):
        with pytest.raises(Refused, match="hook refused"):
            await refused
    receipt = await world.escrow.reject(CLIENT, open_job, REASON)
    failures = decode_events(JobEscrow.HookFailed, world.escrow.address, receipt)
    assert [failure.selector for failure in failures] == [selector("reject")] * 2


async def set_mode(world: Escrow, hook: str, mode: int) -> None:
    await world.chain.send(STRANGER, hook, keccak(b"set_mode(uint256)")[:4] + mode.to_bytes(32, "big"))


# --- what it refuses --------------------------------------------------------------------------------------------------


async def test_a_job_needs_sound_terms(world: Escrow) -> None:
    provider, evaluator, escrow = PROVIDER.account, EVALUATOR.account, world.escrow
    quiet = await deploy_code(world.chain, QUIET)
    for terms, reason in [
        ((provider, NOBODY, DEADLINE, "x"), "bad evaluator"),
        ((provider, escrow.address, DEADLINE, "x"), "bad evaluator"),
        ((provider, evaluator, NOW, "x"), "bad deadline"),
        ((provider, evaluator, 2**40, "x"), "bad deadline"),
        ((evaluator, evaluator, DEADLINE, "x"), "bad provider"),
        ((CLIENT.account, evaluator, DEADLINE, "x"), "bad provider"),
        ((escrow.address, evaluator, DEADLINE, "x"), "bad provider"),
        ((provider, evaluator, DEADLINE, "x", STRANGER.account), "hook is no contract"),
        ((provider, evaluator, DEADLINE, "x", quiet, 10_001), "bad part"),
        ((provider, evaluator, DEADLINE, "x", quiet, 0, 2**96), "bond too large"),
    ]:
        with pytest.raises(Invalid, match=reason):
            await escrow.createJob(CLIENT, *terms)
    assert await escrow.job_count() == 0


async def test_an_escrow_needs_an_asset_and_a_bounded_grace(world: Escrow) -> None:
    with pytest.raises(Invalid, match="asset is no contract"):
        await JobEscrow.deploy(world.chain, CLIENT, STRANGER.account, GRACE)
    with pytest.raises(Invalid, match="grace too long"):
        await JobEscrow.deploy(world.chain, CLIENT, world.coin.address, 30 * 86_400 + 1)


async def test_nobody_acts_for_another(world: Escrow) -> None:
    escrow, other = world.escrow, PROVIDER.account
    open_job, funded, submitted = await world.open(bond=9), await world.funded(), await world.submitted()
    unnamed = await world.open(provider=None)
    for attempt, reason in [
        (escrow.setProvider(STRANGER, unnamed, other), "not the client"),
        (escrow.setBudget(EVALUATOR, open_job, 1), "neither client nor provider"),
        (escrow.fund(STRANGER, open_job, 1_000), "not the client"),
        (escrow.postBond(CLIENT, open_job), "not the evaluator"),
        (escrow.withdrawBond(CLIENT, open_job), "not the evaluator"),
        (escrow.reject(EVALUATOR, open_job, REASON), "not the client"),
        (escrow.submit(CLIENT, funded, WORK), "not the provider"),
        (escrow.reject(CLIENT, funded, REASON), "not the evaluator"),
        (escrow.complete(PROVIDER, submitted, REASON), "not the evaluator"),
        (escrow.reject(CLIENT, submitted, REASON), "not the evaluator"),
    ]:
        with pytest.raises(Refused, match=reason):
            await attempt


async def test_each_call_has_its_state(world: Escrow) -> None:
    escrow = world.escrow
    ids = {OPEN: await world.open(), FUNDED: await world.funded(), SUBMITTED: await world.submitted()}
    ids[COMPLETED], ids[REJECTED] = await world.submitted(), await world.submitted()
    await escrow.complete(EVALUATOR, ids[COMPLETED], REASON)
    await escrow.reject(EVALUATOR, ids[REJECTED], REASON)
    for status, job in ids.items():
        if status != OPEN:
            for attempt in (
                escrow.setProvider(CLIENT, job, PROVIDER.account),
                escrow.setBudget(CLIENT, job, 5),
                escrow.fund(CLIENT, job, 1_000),
                escrow.fundWithAuthorization(CLIENT, job, 1_000, *await world.authorization(job)),
                escrow.postBond(EVALUATOR, job),
            ):
                with pytest.raises(Conflict, match="not open"):
                    await attempt
        if status != FUNDED:
            with pytest.raises(Conflict, match="not funded"):
                await escrow.submit(PROVIDER, job, WORK)
        if status != SUBMITTED:
            with pytest.raises(Conflict, match="not submitted"):
                await escrow.complete(EVALUATOR, job, REASON)
        if status in (COMPLETED, REJECTED):
            with pytest.raises(Conflict, match="closed already"):
                await escrow.reject(EVALUATOR, job, REASON)
    await world.later(DEADLINE - NOW + GRACE)
    for status in (OPEN, COMPLETED, REJECTED):
        with pytest.raises(Conflict, match="nothing to refund"):
            await escrow.claimRefund(CLIENT, ids[status])
    for status in (FUNDED, SUBMITTED):
        await escrow.claimRefund(CLIENT, ids[status])
        with pytest.raises(Conflict, match="nothing to refund"):
            await escrow.claimRefund(CLIENT, ids[status])


async def test_a_price_changed_a_moment_ago_is_not_paid(world: Escrow) -> None:
    job = await world.open(1_000)
    await world.escrow.setBudget(PROVIDER, job, 2_000)
    with pytest.raises(Conflict, match="another budget"):
        await world.escrow.fund(CLIENT, job, 1_000)
    with pytest.raises(Conflict, match="another budget"):
        await world.escrow.fundWithAuthorization(STRANGER, job, 1_000, *await world.authorization(job))


async def test_what_is_missing_is_named(world: Escrow) -> None:
    escrow = world.escrow
    with pytest.raises(Missing, match="no such job"):
        await escrow.jobs(77)
    with pytest.raises(Missing, match="no such job"):
        await escrow.claimRefund(CLIENT, 0)
    with pytest.raises(Refused, match="no budget"):
        await escrow.fund(CLIENT, await world.open(0), 0)
    with pytest.raises(Invalid, match="budget too large"):
        await escrow.setBudget(CLIENT, await world.open(), 2**96)
    with pytest.raises(Conflict, match="provider is set"):
        await escrow.setProvider(CLIENT, await world.open(), WORKERS[3].account)
    with pytest.raises(Invalid, match="bad provider"):
        await escrow.setProvider(CLIENT, await world.open(provider=None), NOBODY)
    with pytest.raises(Conflict, match="no bond to post"):
        await escrow.postBond(EVALUATOR, await world.open())
    with pytest.raises(Conflict, match="no bond to post"):
        await escrow.postBond(EVALUATOR, await world.open(bond=5))
    with pytest.raises(Refused, match="nothing owed"):
        await escrow.withdraw(CLIENT, PROVIDER.account)
    with pytest.raises(PaymentRequired, match="exceeds balance"):
        await escrow.fund(CLIENT, await world.open(10**13), 10**13)


async def test_who_comes_late_is_refused(world: Escrow) -> None:
    open_job, funded, submitted = await world.open(), await world.funded(), await world.submitted()
    judged = await world.submitted()
    await world.later(DEADLINE - NOW - 1)
    await world.escrow.submit(PROVIDER, await world.funded(), WORK)  # the last second
    await world.later(1)
    for attempt in (
        world.escrow.fund(CLIENT, open_job, 1_000),
        world.escrow.fundWithAuthorization(CLIENT, open_job, 1_000, *await world.authorization(open_job)),
        world.escrow.submit(PROVIDER, funded, WORK),
    ):
        with pytest.raises(Late, match="too late"):
            await attempt
    await world.later(GRACE - 1)
    await world.escrow.complete(EVALUATOR, judged, REASON)  # the last second
    await world.later(1)
    for attempt in (
        world.escrow.complete(EVALUATOR, submitted, REASON),
        world.escrow.reject(EVALUATOR, submitted, REASON),
    ):
        with pytest.raises(Late, match="too late"):
            await attempt


async def test_a_hook_gets_its_gas_or_the_call_fails(world: Escrow) -> None:
    """Else who sends an action could keep the hook from hearing of it."""
    hook = await deploy_code(world.chain, compiled(HOOK))
    job = await world.submitted(hook=hook)
    data = keccak(b"complete(uint256,bytes32)")[:4] + abi.encode(["uint256", "bytes32"], (job, REASON))
    call = {"from": EVALUATOR.account, "to": world.escrow.address, "data": "0x" + data.hex()}
    with pytest.raises(TesseraError, match="too little gas for the hook"):
        await world.chain.request("eth_call", [{**call, "gas": hex(200_000)}, "latest"])
    await world.chain.request("eth_call", [{**call, "gas": hex(500_000)}, "latest"])


async def test_a_payee_that_cannot_be_paid_waits_for_his_money_alone(world: Escrow) -> None:
    """USDC freezes accounts. The others of the job are paid at once, he when he can be."""
    coin = Coin(world.chain, await deploy_code(world.chain, compiled(FREEZING)))
    escrow = await JobEscrow.deploy(world.chain, CLIENT, coin.address, GRACE)
    other = Escrow(world.chain, coin, escrow, world.clock)
    job = await other.submitted(1_000, bond=300, on_silence=5_000)
    await freeze(coin, PROVIDER.account)
    await world.later(DEADLINE - NOW + GRACE)
    receipt = await escrow.claimRefund(CLIENT, job)
    (failed,) = decode_events(JobEscrow.PaymentFailed, escrow.address, receipt)
    assert (failed.payee, failed.amount) == (PROVIDER.account, 650)
    assert await escrow.owed(PROVIDER.account) == await coin.balanceOf(escrow.address) == 650
    with pytest.raises(Refused, match="frozen"):
        await escrow.withdraw(STRANGER, PROVIDER.account)
    await freeze(coin, key("nobody in particular").account)
    await escrow.withdraw(STRANGER, PROVIDER.account)
    assert (await escrow.owed(PROVIDER.account), await coin.balanceOf(PROVIDER.account)) == (0, 650)


async def freeze(coin: Coin, account: str) -> None:
    data = keccak(b"freeze(address)")[:4] + abi.encode(["address"], (account,))
    await coin.chain.send(STRANGER, coin.address, data)


FREEZING = """
# pragma version 0.4.3
balances: HashMap[address, int256]
frozen: address

@external
def freeze(account: address):
    self.frozen = account

@external
@view
def balanceOf(account: address) -> uint256:
    return convert(self.balances[account], uint256)

@external
def transfer(payee: address, amount: uint256) -> bool:
    assert payee != self.frozen, "frozen"
    self.balances[msg.sender] -= convert(amount, int256)
    self.balances[payee] += convert(amount, int256)
    return True

@external
def transferFrom(payer: address, payee: address, amount: uint256) -> bool:
    self.balances[payer] -= convert(amount, int256)
    self.balances[payee] += convert(amount, int256)
    return True
"""


async def test_the_chain_is_the_only_clock() -> None:
    """Two escrows on two chains share nothing."""
    chain = memory_chain().client()
    coin = await Coin.deploy(chain, CLIENT)
    assert await (await JobEscrow.deploy(chain, CLIENT, coin.address, 0)).grace() == 0
