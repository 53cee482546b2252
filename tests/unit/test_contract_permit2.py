"""Permit2 and x402's proxies in the first block: what is signed is paid once, all else is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from chain_support import CHAIN_ID, NOW, ROOT, WORKERS, key, memory_chain
from permit2_support import FACILITATOR, MOST, PAYEE, PAYER, Signed, coin_for_permit2, signed, standard_on
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin, Permit2, X402ExactProxy, X402UptoProxy
from tessera.chain.genesis import EXACT_PROXY, PERMIT2, UPTO_PROXY
from tessera.chain.local import LocalChain
from tessera.chain.reverts import ERRORS
from tessera.core.errors import Conflict, Invalid, PaymentRequired, Refused, TesseraError
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
NOBODY = Account("0x" + "00" * 20)


class Shop:
    """A chain with a coin that the payer has approved for Permit2."""

    def __init__(self, local: LocalChain, coin: Coin, exact: X402ExactProxy, upto: X402UptoProxy) -> None:
        self.local, self.chain, self.coin, self.exact, self.upto = local, coin.chain, coin, exact, upto
        self.permit2 = Permit2(self.chain, PERMIT2)

    async def pay_upto(self, pay: Signed, amount: int = 40, sender: AccountKey = FACILITATOR) -> None:
        await self.upto.settle(sender, pay.permit, amount, pay.owner, pay.witness, pay.signature)

    async def pay_exact(self, pay: Signed, sender: AccountKey = WORKERS[0]) -> None:
        await self.exact.settle(sender, pay.permit, pay.owner, pay.witness, pay.signature)

    async def balances(self) -> tuple[int, int]:
        return await self.coin.balanceOf(PAYER.account), await self.coin.balanceOf(PAYEE)


_kept: list[tuple[Shop, list[int]]] = []


@pytest.fixture
async def shop() -> Shop:
    """Made once and brought back by a snapshot."""
    if not _kept:
        local = memory_chain()
        chain = local.client()
        coin = await coin_for_permit2(chain)
        _kept.append((Shop(local, coin, *await standard_on(chain)), []))
    made, snapshots = _kept[0]
    if snapshots:
        assert made.local.revert(snapshots.pop())
    snapshots.append(made.local.snapshot())
    chain = made.local.client()
    return Shop(made.local, Coin(chain, made.coin.address), *await standard_on(chain))


async def test_they_stand_at_their_canonical_addresses_on_a_new_chain() -> None:
    chain = memory_chain().client()
    from x402.mechanisms.evm import constants

    assert constants.PERMIT2_ADDRESS == PERMIT2
    assert constants.X402_EXACT_PERMIT2_PROXY_ADDRESS == EXACT_PROXY
    assert constants.X402_UPTO_PERMIT2_PROXY_ADDRESS == UPTO_PROXY
    exact, upto = await standard_on(chain)
    assert (await exact.PERMIT2(), await upto.PERMIT2()) == (PERMIT2, PERMIT2)
    for proxy, types in (
        (exact, constants.PERMIT2_WITNESS_TYPES),
        (upto, constants.UPTO_PERMIT2_WITNESS_TYPES),
    ):
        permissions, witness = (
            f"{name}({','.join(field['type'] + ' ' + field['name'] for field in types[name])})"
            for name in ("TokenPermissions", "Witness")
        )
        assert await proxy.WITNESS_TYPE_STRING() == "Witness witness)" + permissions + witness


async def test_the_domain_is_permit2s(shop: Shop) -> None:
    kind = keccak(b"EIP712Domain(string name,uint256 chainId,address verifyingContract)")
    fields = kind + keccak(b"Permit2") + CHAIN_ID.to_bytes(32, "big") + bytes(12) + bytes.fromhex(PERMIT2[2:])
    assert await shop.permit2.DOMAIN_SEPARATOR() == keccak(fields)


async def test_an_exact_payment_is_carried_by_anybody(shop: Shop) -> None:
    await shop.pay_exact(signed(shop.coin.address, "exact"))
    assert await shop.balances() == (9 * MOST, MOST)


@pytest.mark.parametrize("amount", [1, 40, MOST])
async def test_an_upto_payment_is_what_the_facilitator_says_up_to_the_signed_amount(shop: Shop, amount: int) -> None:
    await shop.pay_upto(signed(shop.coin.address, "upto"), amount)
    assert await shop.balances() == (10 * MOST - amount, amount)


@pytest.mark.parametrize("scheme", ["exact", "upto"])
async def test_a_signature_pays_once_however_little_it_paid(shop: Shop, scheme: str) -> None:
    pay = shop.pay_exact if scheme == "exact" else shop.pay_upto
    await pay(signed(shop.coin.address, scheme, nonce=300))
    before = await shop.balances()
    with pytest.raises(Conflict, match="InvalidNonce"):
        await pay(signed(shop.coin.address, scheme, nonce=300))
    with pytest.raises(Conflict, match="InvalidNonce"):
        await pay(signed(shop.coin.address, scheme, nonce=300, amount=MOST + 1))
    assert await shop.balances() == before
    await pay(signed(shop.coin.address, scheme, nonce=301))
    await pay(signed(shop.coin.address, scheme, nonce=300 + 256))
    await pay(signed(shop.coin.address, scheme, nonce=2**256 - 1))
    assert await shop.permit2.nonceBitmap(PAYER.account, 1) == (1 << 44) | (1 << 45)


WRONG_UPTO: dict[str, tuple[dict[str, Any], int, type[TesseraError], str]] = {
    "of nothing": ({}, 0, Invalid, "InvalidAmount"),
    "of more than signed": ({}, MOST + 1, Invalid, "AmountExceedsPermitted"),
    "to nobody": ({"to": NOBODY}, 40, Invalid, "InvalidDestination"),
    "too early": ({"validAfter": NOW + 1_000}, 40, Refused, "PaymentTooEarly"),
    "too late": ({"deadline": NOW - 1}, 40, Invalid, rf"SignatureExpired\({NOW - 1}\)"),
    "by another facilitator": ({"facilitator": PAYEE}, 40, Refused, "UnauthorizedFacilitator"),
    "from nobody": ({"owner": NOBODY}, 40, Invalid, "InvalidOwner"),
    "for another spender": ({"spender": EXACT_PROXY}, 40, Invalid, "InvalidSigner"),
    "from somebody else": ({"owner": PAYEE}, 40, Invalid, "InvalidSigner"),
    "on another chain": ({"chainId": 1}, 40, Invalid, "InvalidSigner"),
    "at another Permit2": ({"verifyingContract": UPTO_PROXY}, 40, Invalid, "InvalidSigner"),
    "of coins that are not there": ({"amount": 99 * MOST}, 11 * MOST, PaymentRequired, "exceeds balance"),
}


@pytest.mark.parametrize("how", WRONG_UPTO)
async def test_a_wrong_upto_payment_moves_nothing(shop: Shop, how: str) -> None:
    changes, amount, error, reason = WRONG_UPTO[how]
    with pytest.raises(error, match=reason) as caught:
        await shop.pay_upto(signed(shop.coin.address, "upto", **changes), amount)
    assert type(caught.value) is error
    assert await shop.balances() == (10 * MOST, 0)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"amount": 0}, Invalid, "InvalidAmount"),
        ({"to": NOBODY}, Invalid, "InvalidDestination"),
        ({"owner": NOBODY}, Invalid, "InvalidOwner"),
        ({"validAfter": NOW + 1_000}, Refused, "PaymentTooEarly"),
        ({"deadline": NOW - 1}, Invalid, "SignatureExpired"),
        ({"spender": UPTO_PROXY}, Invalid, "InvalidSigner"),
    ],
)
async def test_a_wrong_exact_payment_moves_nothing(
    shop: Shop, changes: dict[str, Any], error: type[TesseraError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        await shop.pay_exact(signed(shop.coin.address, "exact", **changes))
    assert await shop.balances() == (10 * MOST, 0)


@pytest.mark.parametrize("part", ["token", "amount", "nonce", "deadline", "to", "facilitator", "validAfter"])
async def test_what_is_signed_cannot_be_changed(shop: Shop, part: str) -> None:
    """A facilitator that wants more, sooner, or for somebody else."""
    other = await coin_for_permit2(shop.chain)
    change: dict[str, Any] = {
        "token": other.address, "amount": MOST + 1, "nonce": 6, "deadline": NOW + 601, "to": FACILITATOR.account,
        "facilitator": WORKERS[0].account, "validAfter": 1,
    }  # fmt: skip
    honest = signed(shop.coin.address, "upto")
    greedy = signed(shop.coin.address, "upto", **{part: change[part]})
    forged = Signed(greedy.permit, honest.owner, greedy.witness, honest.signature)
    with pytest.raises(Invalid, match="InvalidSigner"):
        await shop.pay_upto(forged, sender=WORKERS[0] if part == "facilitator" else FACILITATOR)
    assert await shop.balances() == (10 * MOST, 0)


@pytest.mark.parametrize(
    ("signature", "reason"),
    [
        (b"", "InvalidSignatureLength"),
        (b"\x01" * 64, "InvalidSignatureLength"),
        (b"\x01" * 66, "InvalidSignatureLength"),
        (b"\x01" * 64 + b"\x05", "InvalidSignature"),
        (bytes(64) + b"\x1b", "InvalidSignature"),
        (b"\x01" * 32 + b"\xff" * 32 + b"\x1b", "InvalidSignature"),
    ],
)
async def test_garbage_is_no_signature(shop: Shop, signature: bytes, reason: str) -> None:
    pay = signed(shop.coin.address, "upto")
    with pytest.raises(Invalid, match=rf"{reason}\(\)"):
        await shop.pay_upto(Signed(pay.permit, pay.owner, pay.witness, signature))


async def test_the_payer_takes_back_what_was_signed(shop: Shop) -> None:
    await shop.permit2.invalidateUnorderedNonces(PAYER, 0, 1 << 5)
    with pytest.raises(Conflict, match="InvalidNonce"):
        await shop.pay_upto(signed(shop.coin.address, "upto", nonce=5))
    await shop.permit2.invalidateUnorderedNonces(FACILITATOR, 0, 2**256 - 1)  # its own only
    await shop.pay_upto(signed(shop.coin.address, "upto", nonce=6))


async def test_without_an_allowance_nothing_moves(shop: Shop) -> None:
    await shop.coin.approve(PAYER, PERMIT2, 0)
    with pytest.raises(Refused, match="exceeds allowance"):
        await shop.pay_upto(signed(shop.coin.address, "upto"))
    await shop.coin.approve(PAYER, PERMIT2, 2**256 - 1)
    await shop.pay_upto(signed(shop.coin.address, "upto"))  # the refusal used no nonce


async def test_a_stranger_cannot_call_permit2_with_a_payment_for_a_proxy(shop: Shop) -> None:
    pay = signed(shop.coin.address, "upto")
    kind = await shop.upto.WITNESS_TYPE_STRING()
    with pytest.raises(Invalid, match="InvalidSigner"):
        await shop.permit2.permitWitnessTransferFrom(
            key("attacker"), pay.permit, (key("attacker").account, 40), pay.owner, b"\x11" * 32, kind, pay.signature
        )
    with pytest.raises(Invalid, match=rf"InvalidAmount\({MOST}\)"):
        await shop.permit2.permitWitnessTransferFrom(
            FACILITATOR, pay.permit, (PAYEE, MOST + 1), pay.owner, b"\x11" * 32, kind, pay.signature
        )


async def made(chain: RpcChain | Any, runtime: str) -> Account:
    code = bytes.fromhex(runtime)
    receipt = await chain.send(PAYER, None, bytes([0x60, len(code)]) + bytes.fromhex("80600a5f395ff300") + code)
    assert receipt.contract
    return Account(receipt.contract)


async def test_a_wallet_that_is_a_contract_says_itself_what_it_signed(shop: Shop) -> None:
    yes = await made(shop.chain, "631626ba7e60e01b5f5260205ff3")
    no = await made(shop.chain, "5f5f5260205ff3")
    for wallet in (yes, no):
        await shop.coin.mint(PAYER, wallet, MOST)
    pay = signed(shop.coin.address, "upto", owner=yes)
    with pytest.raises(Refused, match="exceeds allowance"):  # the signature passed
        await shop.pay_upto(Signed(pay.permit, yes, pay.witness, b"anything"))
    with pytest.raises(Invalid, match="InvalidContractSignature"):
        await shop.pay_upto(Signed(pay.permit, no, pay.witness, pay.signature))


async def test_coins_that_answer_nothing_pass_and_those_that_say_no_do_not(shop: Shop) -> None:
    silent, unwilling = await made(shop.chain, "00"), await made(shop.chain, "5f5f5260205ff3")
    await shop.pay_upto(signed(silent, "upto"))
    with pytest.raises(Refused, match="permit2: transfer failed"):
        await shop.pay_upto(signed(unwilling, "upto", nonce=9))
    with pytest.raises(TesseraError):
        await shop.pay_upto(signed(PAYEE, "upto", nonce=10))  # no contract at all


def test_the_contracts_errors_are_the_table() -> None:
    """Those of the deployed contracts: a client that reads them on a public chain reads ours too."""
    sources = "".join(path.read_text() for path in (ROOT / "contracts").rglob("*.vy"))
    raised = set(re.findall(r'method_id\("([A-Z]\w+\([^"]*\))"\)', sources))
    assert raised == set(ERRORS)
    tests = (ROOT / "tests/unit/test_contract_permit2.py").read_text()
    assert all(name.partition("(")[0] in tests for name in raised)


async def test_a_journal_that_began_without_them_goes_on_without_them(tmp_path: Any) -> None:
    path = tmp_path / "chain.db"
    with LocalChain(path, chain_id=CHAIN_ID, contracts={}) as old:
        await Coin.deploy(old.client(), PAYER)
        head = old.head
    import sqlite3

    with sqlite3.connect(path) as database:
        assert database.execute("delete from meta where name = 'contracts'").rowcount == 1  # as it was then
    database.close()
    with LocalChain(path, chain_id=CHAIN_ID) as chain:
        assert (chain.head, chain.genesis.contracts) == (head, {})
        assert await chain.client().code(PERMIT2) == b""


async def test_a_journal_keeps_the_contracts_that_it_began_with(tmp_path: Any) -> None:
    """Whatever later versions compile them to."""
    path, code = tmp_path / "chain.db", b"\x60\x00"
    with LocalChain(path, chain_id=CHAIN_ID, contracts={PERMIT2: code}):
        pass
    with LocalChain(path, chain_id=CHAIN_ID) as chain:
        assert await chain.client().code(PERMIT2) == code
        assert chain.request("tessera_genesis", []) == {"alloc": {}, "contracts": {PERMIT2: "0x6000"}}
    with pytest.raises(Invalid, match="another chain's: its contracts"):
        LocalChain(path, chain_id=CHAIN_ID, contracts={PERMIT2: b"\x00"})
