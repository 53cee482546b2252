"""The share contract as it ships, on a chain: what it admits, what it pays, and everything it refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from chain_support import ROOT, RUN_ID, WORKERS, World, key, local_world, make_world
from tessera.chain import abi
from tessera.chain.face import decode_events
from tessera.chain.faces import Coin, ModelShare
from tessera.chain.reverts import REASONS
from tessera.chain.settle import income_table
from tessera.chain.types import Chain, Receipt
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Refused, TesseraError
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.merkle import MerkleTree, share_leaf
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
ROOT_32 = b"\x07" * 32
ZERO = Account("0x" + "00" * 20)
HOLDER, OTHER = key("holder").account, key("other").account

CREATION = bytes.fromhex("600d380380600d6000396000f3")  # makes a contract of the code behind it
# Calls whom the last 20 bytes name with the bytes before, and answers or reverts as it does.
PROXY = bytes.fromhex("60143603806000600037600060008260006000853560601c5af13d600060003e6027573d6000fd5b3d6000f3")
POST = keccak(b"post(uint256,bytes32,uint256)")[:4]


@pytest.fixture
async def world() -> World:
    return await local_world()


# --- posting ----------------------------------------------------------------------------------------------------------


async def issued_by_hand(world: World) -> ByHand:
    """A share that needs no run's consent, for what no run would let through."""
    proxy = (await world.chain.send(WORKERS[0], None, CREATION + PROXY)).contract
    assert proxy
    share = await ModelShare.deploy(world.chain, WORKERS[0], "M", "M", world.coin.address, bytes.fromhex(RUN_ID), proxy)
    return ByHand(world.chain, share.address, proxy)


class ByHand(ModelShare):
    """A share whose issuer passes on what anybody sends: `post` goes through it."""

    def __init__(self, chain: Chain, address: Account, proxy: Account) -> None:
        super().__init__(chain, address)
        self.proxy = proxy

    async def post(self, key: AccountKey, epoch: int, root: bytes, shares: int) -> Receipt:
        data = POST + abi.encode(("uint256", "bytes32", "uint256"), (epoch, root, shares))
        return await self.chain.send(key, self.proxy, data + bytes.fromhex(self.address[2:]))


async def test_only_the_issuer_posts(world: World) -> None:
    for stranger in (WORKERS[0], key("stranger")):
        with pytest.raises(Refused, match="not the issuer"):
            await world.share.post(stranger, 0, ROOT_32, 5)


async def test_a_posted_epoch_is_announced(world: World) -> None:
    proposal = await world.propose({HOLDER: 5})
    receipt = await world.run.post(key("stranger"), *proposal.fields)
    (posted,) = decode_events(ModelShare.Posted, world.share.address, receipt)
    assert (posted.epoch, posted.root, posted.shares) == (0, proposal.root, 5)


async def test_epochs_come_once_each_and_in_order(world: World) -> None:
    share = await issued_by_hand(world)
    for epoch in (1, 2**256 - 1):
        with pytest.raises(Conflict, match="not the next epoch"):
            await share.post(WORKERS[0], epoch, ROOT_32, 5)
    await share.post(WORKERS[0], 0, ROOT_32, 5)
    with pytest.raises(Conflict, match="not the next epoch"):
        await share.post(WORKERS[0], 0, ROOT_32, 5)


async def test_all_epochs_together_stay_below_2_128_shares(world: World) -> None:
    share = await issued_by_hand(world)
    with pytest.raises(Invalid, match="too many shares"):
        await share.post(WORKERS[0], 0, ROOT_32, 2**128)
    await share.post(WORKERS[0], 0, ROOT_32, 2**128 - 2)
    with pytest.raises(Invalid, match="too many shares"):
        await share.post(WORKERS[0], 1, ROOT_32, 2)
    await share.post(WORKERS[0], 1, ROOT_32, 1)


async def test_an_epoch_without_verified_work_is_one_too(world: World) -> None:
    share = await issued_by_hand(world)
    await share.post(WORKERS[0], 0, bytes(32), 0)
    assert (await share.epoch_count(), await share.totalSupply()) == (1, 0)
    await share.post(WORKERS[0], 1, ROOT_32, 5)


async def test_asset_and_issuer_must_be_contracts(world: World) -> None:
    for asset, issuer, reason in (
        (OTHER, world.run.address, "asset is no contract"),
        (world.coin.address, OTHER, "issuer is no contract"),
    ):
        with pytest.raises(Invalid, match=reason):
            await ModelShare.deploy(world.chain, WORKERS[0], "M", "M", asset, bytes(32), issuer)


# --- redeeming --------------------------------------------------------------------------------------------------------


async def test_a_posted_epoch_counts_before_it_is_redeemed(world: World) -> None:
    await world.epoch({HOLDER: 10, OTHER: 30})
    assert await world.share.totalSupply() == 40
    assert await world.share.balanceOf(HOLDER) == 0
    assert (await world.share.epochs(0)).unredeemed == 40


async def test_redeeming_late_loses_nothing(world: World) -> None:
    who = [key(f"late {i}").account for i in range(7)]
    tree = await world.epoch({account: i + 1 for i, account in enumerate(who)})
    await world.earn(28_000)
    for i, account in enumerate(who):
        await world.share.redeem(key("stranger"), 0, account, i + 1, tree.proof(i))
        assert await world.share.claimable(account) == 1_000 * (i + 1)
    assert await world.share.totalSupply() == 28


async def test_a_leaf_is_redeemed_once(world: World) -> None:
    await world.give({HOLDER: 10, OTHER: 30})
    tree = MerkleTree([share_leaf(0, HOLDER, 10), share_leaf(0, OTHER, 30)])
    with pytest.raises(Conflict, match="already redeemed"):
        await world.share.redeem(WORKERS[0], 0, HOLDER, 10, tree.proof(0))
    assert await world.share.counted(share_leaf(0, HOLDER, 10))


@pytest.mark.parametrize("change", ["epoch", "holder", "shares", "proof", "no epoch"])
async def test_only_what_was_posted_can_be_redeemed(world: World, change: str) -> None:
    tree = await world.epoch({HOLDER: 10, OTHER: 30})
    await world.epoch({HOLDER: 11, OTHER: 30})
    with pytest.raises(Invalid, match="bad proof"):
        await world.share.redeem(
            WORKERS[0],
            {"epoch": 1, "no epoch": 9}.get(change, 0),
            key("thief").account if change == "holder" else HOLDER,
            40 if change == "shares" else 10,
            [] if change == "proof" else tree.proof(0),
        )


async def test_an_inner_node_of_the_tree_is_no_leaf(world: World) -> None:
    """A leaf is hashed twice: otherwise a node's two halves could be shown as somebody's shares."""
    tree = await world.epoch({key(f"holder {i}").account: i + 1 for i in range(4)})
    with pytest.raises(Invalid, match="bad proof"):
        await world.share.redeem(WORKERS[0], 0, HOLDER, int.from_bytes(tree.proof(0)[1], "big"), tree.proof(0)[1:])


async def test_a_root_that_promises_too_much_pays_only_what_was_posted(world: World) -> None:
    share, tree = await issued_by_hand(world), MerkleTree([share_leaf(0, HOLDER, 50), share_leaf(0, OTHER, 50)])
    await share.post(WORKERS[0], 0, tree.root, 60)
    await share.redeem(WORKERS[0], 0, HOLDER, 50, tree.proof(0))
    with pytest.raises(Refused, match="epoch exhausted"):
        await share.redeem(WORKERS[0], 0, OTHER, 50, tree.proof(1))


async def test_neither_nobody_nor_the_contract_can_hold_shares(world: World) -> None:
    tree = await world.epoch({ZERO: 5, world.share.address: 5})
    for index, holder in enumerate([ZERO, world.share.address]):
        with pytest.raises(Invalid, match="bad holder"):
            await world.share.redeem(WORKERS[0], 0, holder, 5, tree.proof(index))


# --- income -----------------------------------------------------------------------------------------------------------


async def test_income_follows_shares(world: World) -> None:
    await world.give({HOLDER: 3, OTHER: 1})
    await world.earn(100)
    assert await world.share.claimable(HOLDER) == 75
    await world.share.claim(key("holder"))
    assert await world.coin.balanceOf(HOLDER) == 75
    assert await world.share.claimable(HOLDER) == 0


async def test_anybody_may_claim_for_a_holder_and_only_the_holder_is_paid(world: World) -> None:
    await world.give({HOLDER: 1})
    await world.earn(100)
    stranger = key("stranger")
    receipt = await world.share.claim(stranger, HOLDER)
    assert await world.coin.balanceOf(HOLDER) == 100
    assert await world.coin.balanceOf(stranger.account) == 0
    assert [e.amount for e in decode_events(ModelShare.Claimed, world.share.address, receipt)] == [100]
    await world.share.claim(stranger)
    assert await world.coin.balanceOf(stranger.account) == 0


async def test_income_before_the_first_share_waits(world: World) -> None:
    await world.earn(100)
    assert await world.share.held() == 0
    assert await world.share.undistributed() == 100
    await world.give({HOLDER: 7})
    await world.share.distribute(WORKERS[0])
    assert await world.share.claimable(HOLDER) in (99, 100)


async def test_later_epochs_earn_nothing_from_earlier_income(world: World) -> None:
    await world.give({HOLDER: 1})
    await world.earn(100)
    await world.give({OTHER: 1})
    assert await world.share.claimable(OTHER) == 0
    await world.earn(100)
    assert await world.share.claimable(OTHER) == 50
    assert await world.share.claimable(HOLDER) == 150


async def test_fractions_are_kept_and_paid_when_they_make_a_unit(world: World) -> None:
    """Three holders and one unit at a time: rounding at every step would pay nobody anything for ever."""
    who = [key(f"third {i}") for i in range(3)]
    await world.give({k.account: 1 for k in who})
    for _ in range(6):
        await world.earn(1)
        for holder in who:
            await world.share.claim(holder)
    paid = [await world.coin.balanceOf(k.account) for k in who]
    assert paid == [1, 1, 1]  # the second is short by less than 2^-120 of a unit
    await world.earn(1)
    assert [await world.share.claimable(k.account) for k in who] == [1, 1, 1]


async def test_income_beyond_2_128_is_refused_and_claims_stay_open(world: World) -> None:
    await world.give({HOLDER: 1})
    await world.earn(50)
    await world.coin.mint(WORKERS[0], world.share.address, 2**128)
    with pytest.raises(Refused, match="too much income"):
        await world.share.distribute(WORKERS[0])
    await world.share.claim(key("holder"))
    assert await world.coin.balanceOf(HOLDER) == 50


async def test_a_coin_that_fails_to_pay_reverts_the_claim(world: World) -> None:
    """The holder keeps the claim."""
    liar = (await world.chain.send(WORKERS[0], None, CREATION + LIAR)).contract
    assert liar
    share = await issued_by_hand(replace(world, coin=Coin(world.chain, liar)))
    tree = MerkleTree([share_leaf(0, HOLDER, 1)])
    await share.post(WORKERS[0], 0, tree.root, 1)
    await share.redeem(WORKERS[0], 0, HOLDER, 1, [])
    await share.distribute(WORKERS[0])
    assert await share.claimable(HOLDER) == 1
    with pytest.raises(Refused, match="transfer failed"):
        await share.claim(key("holder"))
    assert await share.claimable(HOLDER) == 1


# Answers whether the call is shorter than 68 bytes: 1 to balanceOf, false to transfer.
LIAR = bytes.fromhex("6044361060005260206000f3")


# --- ERC-20 -----------------------------------------------------------------------------------------------------------


async def test_transferred_shares_leave_their_past_income_behind(world: World) -> None:
    await world.give({HOLDER: 4})
    await world.earn(100)
    await world.share.transfer(key("holder"), OTHER, 3)
    await world.earn(100)
    assert await world.share.claimable(HOLDER) == 125
    assert await world.share.claimable(OTHER) == 75


async def test_transfers_to_oneself_change_nothing(world: World) -> None:
    await world.give({HOLDER: 4})
    await world.earn(100)
    await world.share.transfer(key("holder"), HOLDER, 3)
    assert await world.share.balanceOf(HOLDER) == 4
    assert await world.share.claimable(HOLDER) == 100


async def test_an_allowance_is_used_up_unless_it_is_the_maximum(world: World) -> None:
    await world.give({HOLDER: 10})
    spender = key("spender")
    await world.share.approve(key("holder"), spender.account, 3)
    await world.share.transferFrom(spender, HOLDER, OTHER, 2)
    assert await world.share.allowance(HOLDER, spender.account) == 1
    with pytest.raises(Refused, match="allowance too small"):
        await world.share.transferFrom(spender, HOLDER, OTHER, 2)
    await world.share.approve(key("holder"), spender.account, 2**256 - 1)
    await world.share.transferFrom(spender, HOLDER, OTHER, 2)
    assert await world.share.allowance(HOLDER, spender.account) == 2**256 - 1
    assert await world.share.balanceOf(OTHER) == 4


async def test_shares_one_does_not_have_cannot_move(world: World) -> None:
    await world.give({HOLDER: 10})
    with pytest.raises(Refused, match="balance too small"):
        await world.share.transfer(key("holder"), OTHER, 11)


async def test_shares_cannot_be_lost_to_nobody_or_to_the_contract(world: World) -> None:
    await world.give({HOLDER: 10})
    for receiver in (ZERO, world.share.address):
        with pytest.raises(Invalid, match="bad receiver"):
            await world.share.transfer(key("holder"), receiver, 1)


async def test_the_contract_says_what_it_is(world: World) -> None:
    share = world.share
    assert [await share.name(), await share.symbol(), await share.decimals()] == ["Model A", "MDLA", 18]
    assert await share.asset() == world.coin.address
    assert await share.issuer() == world.run.address
    assert await share.run_id() == bytes.fromhex(RUN_ID)


# --- the books --------------------------------------------------------------------------------------------------------


async def test_the_books_balance_to_the_last_unit(world: World) -> None:
    tree = await world.epoch({HOLDER: 7, OTHER: 5, key("absent").account: 9})
    await world.share.redeem(WORKERS[0], 0, HOLDER, 7, tree.proof(0))
    await world.earn(1_000)
    await world.share.claim(key("holder"))
    await world.share.redeem(WORKERS[0], 0, OTHER, 5, tree.proof(1))
    await world.earn(11)
    await world.coin.mint(key("buyer"), key("buyer").account, 500)
    await world.coin.transfer(key("buyer"), world.share.address, 123)
    table = await income_table(world.chain, world.share.address)
    assert table.revenue == 1_134
    assert table.payers[key("buyer").account] == 123
    assert table.total_claimed + table.unclaimed + table.undistributed + table.dust == table.revenue
    assert table.undistributed == 123
    assert table.claimed == {HOLDER: 333}
    assert table.pending == (1_011 * 9) // 21
    assert 0 < table.dust <= table.roundings == 3
    assert (table.shares, table.unredeemed, table.total_shares) == ({HOLDER: 7, OTHER: 5}, 9, 21)


async def test_books_that_do_not_balance_are_evidence(world: World) -> None:
    """A node that hides one payment is found out."""

    class Hiding:
        def __getattr__(self, name: str) -> object:
            return getattr(world.chain, name)

        async def logs(self, *arguments: object) -> object:
            found = await world.chain.logs(*arguments)  # type: ignore[arg-type]
            return found[1:] if arguments[0] == world.coin.address else found

    await world.give({HOLDER: 1})
    await world.earn(10)
    await world.earn(20)
    with pytest.raises(Misbehaviour, match="revenue - claimed"):
        await income_table(Hiding(), world.share.address)  # type: ignore[arg-type]


async def test_every_reason_is_mapped_to_an_error() -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "contracts").rglob("*.vy")]
    reasons = {reason for text in texts for reason in re.findall(r'"([a-z0-9_]+: [^"]+)"', text)}
    assert reasons == set(REASONS)
    files = (ROOT / "tests" / "unit").glob("test_contract_*.py")
    tests = "".join(path.read_text("utf-8") for path in files).replace("\\", "")
    untested = sorted(reason for reason in reasons if reason.split(": ", 1)[1] not in tests)
    assert not untested, f"no test names these reverts: {untested}"
    assert all(issubclass(cls, TesseraError) for cls in REASONS.values())


async def test_a_second_world_has_its_own_books(world: World) -> None:
    other = await make_world(world.chain)
    await world.give({HOLDER: 1})
    await world.earn(10)
    assert (await income_table(world.chain, other.share.address)).revenue == 0
