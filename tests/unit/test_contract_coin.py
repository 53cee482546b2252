"""The test coin: ERC-20, and payments by signature as USDC has them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID, NOW, WORKERS, key, memory_chain
from tessera.chain import abi
from tessera.chain.faces import Coin
from tessera.core.errors import Conflict, Invalid, PaymentRequired, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

pytestmark = pytest.mark.anyio
ZERO = Account("0x" + "00" * 20)
PAYER, PAYEE, RELAYER = key("payer"), key("payee"), key("relayer")
NONCE = b"\x11" * 32


@pytest.fixture
async def coin() -> Coin:
    coin = await Coin.deploy(memory_chain().client(), WORKERS[0])
    await coin.mint(WORKERS[0], PAYER.account, 1_000)
    return coin


@dataclass(frozen=True)
class Payment:
    """An EIP-3009 authorization and how to sign it, through eth-account's own EIP-712."""

    kind: str = "TransferWithAuthorization"
    sender: Account = PAYER.account
    receiver: Account = PAYEE.account
    amount: int = 400
    valid_after: int = NOW - 10
    valid_before: int = NOW + 10
    nonce: bytes = NONCE

    def sign(self, coin: Coin, signer: AccountKey = PAYER) -> bytes:
        names = ["from", "to", "value", "validAfter", "validBefore", "nonce"]
        kinds = ["address", "address", "uint256", "uint256", "uint256", "bytes32"]
        fields = [{"name": name, "type": kind} for name, kind in zip(names, kinds, strict=True)]
        domain = {"name": "Test USD", "version": "2", "chainId": CHAIN_ID, "verifyingContract": coin.address}
        message = dict(zip(names, self.values, strict=True))
        signable = encode_typed_data(domain, {self.kind: fields}, message)
        return bytes(EthAccount.sign_message(signable, signer.secret).signature)

    @property
    def values(self) -> tuple[Account, Account, int, int, int, bytes]:
        return self.sender, self.receiver, self.amount, self.valid_after, self.valid_before, self.nonce


def vrs(signature: bytes) -> tuple[int, bytes, bytes]:
    return signature[64], signature[:32], signature[32:64]


async def test_a_signed_payment_is_carried_by_anybody(coin: Coin) -> None:
    payment = Payment()
    receipt = await coin.transferWithAuthorization(RELAYER, *payment.values, *vrs(payment.sign(coin)))
    assert receipt.ok
    assert await coin.balanceOf(PAYEE.account) == 400
    assert await coin.authorizationState(PAYER.account, NONCE)
    assert [e.nonce for e in await coin.events(Coin.AuthorizationUsed)] == [NONCE]


async def test_the_signature_may_come_as_65_bytes(coin: Coin) -> None:
    """The other form that USDC has: the same name, another selector."""
    payment = Payment()
    await coin.chain.send(RELAYER, coin.address, bytes_form(payment, payment.sign(coin)))
    assert await coin.balanceOf(PAYEE.account) == 400
    with pytest.raises(Conflict, match="authorization is used or canceled"):
        await coin.chain.send(RELAYER, coin.address, bytes_form(payment, payment.sign(coin)))
    other = replace(payment, nonce=b"\x12" * 32)
    with pytest.raises(Invalid, match="invalid signature"):
        await coin.chain.send(RELAYER, coin.address, bytes_form(other, payment.sign(coin)))


def bytes_form(payment: Payment, signature: bytes) -> bytes:
    kinds = ("address", "address", "uint256", "uint256", "uint256", "bytes32", "bytes")
    selector = keccak(f"transferWithAuthorization({','.join(kinds)})".encode())[:4]
    return selector + abi.encode(kinds, (*payment.values, signature))


@pytest.mark.parametrize("data", [b"\xde\xad\xbe\xef", b"\xde\xad\xbe\xef" + bytes(400)])
async def test_other_selectors_are_refused(coin: Coin, data: bytes) -> None:
    with pytest.raises(Invalid, match="unknown method"):
        await coin.chain.send(RELAYER, coin.address, data)


async def test_a_payment_counts_once(coin: Coin) -> None:
    payment = Payment()
    signature = vrs(payment.sign(coin))
    await coin.transferWithAuthorization(RELAYER, *payment.values, *signature)
    with pytest.raises(Conflict, match="authorization is used or canceled"):
        await coin.transferWithAuthorization(RELAYER, *payment.values, *signature)
    assert await coin.balanceOf(PAYEE.account) == 400


@pytest.mark.parametrize(
    ("payment", "error", "reason"),
    [
        (Payment(valid_after=NOW), Refused, "authorization is not yet valid"),
        (Payment(valid_before=NOW), Invalid, "authorization is expired"),
        (Payment(amount=1_001), PaymentRequired, "transfer amount exceeds balance"),
        (Payment(receiver=ZERO), Invalid, "bad receiver"),
        (Payment(sender=PAYEE.account), Invalid, "invalid signature"),
        (Payment(sender=ZERO), Invalid, "invalid signature"),
        (Payment(kind="ReceiveWithAuthorization"), Invalid, "invalid signature"),
    ],
)
async def test_a_wrong_payment_moves_nothing(coin: Coin, payment: Payment, error: type, reason: str) -> None:
    with pytest.raises(error, match=reason):
        await coin.transferWithAuthorization(RELAYER, *payment.values, *vrs(payment.sign(coin)))
    assert await coin.balanceOf(PAYER.account) == 1_000
    assert not await coin.authorizationState(payment.sender, NONCE)


@pytest.mark.parametrize("field", ["receiver", "amount", "valid_after", "valid_before", "nonce"])
async def test_what_is_signed_cannot_be_changed(coin: Coin, field: str) -> None:
    signed = Payment()
    other = {"receiver": RELAYER.account, "nonce": bytes(32)}.get(field) or getattr(signed, field) + 1
    changed = replace(signed, **{field: other})
    with pytest.raises(Invalid, match="invalid signature"):
        await coin.transferWithAuthorization(RELAYER, *changed.values, *vrs(signed.sign(coin)))


async def test_a_signatures_twin_does_not_count(coin: Coin) -> None:
    order = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
    payment = Payment()
    v, r, s = vrs(payment.sign(coin))
    twin = (55 - v, r, (order - int.from_bytes(s, "big")).to_bytes(32, "big"))
    with pytest.raises(Invalid, match="invalid signature"):
        await coin.transferWithAuthorization(RELAYER, *payment.values, *twin)


async def test_only_the_payee_may_pull(coin: Coin) -> None:
    payment = Payment(kind="ReceiveWithAuthorization")
    signature = vrs(payment.sign(coin))
    with pytest.raises(Refused, match="caller must be the payee"):
        await coin.receiveWithAuthorization(RELAYER, *payment.values, *signature)
    await coin.receiveWithAuthorization(PAYEE, *payment.values, *signature)
    assert await coin.balanceOf(PAYEE.account) == 400


def cancel_signature(coin: Coin, signer: AccountKey = PAYER) -> tuple[int, bytes, bytes]:
    domain = {"name": "Test USD", "version": "2", "chainId": CHAIN_ID, "verifyingContract": coin.address}
    fields = [{"name": "authorizer", "type": "address"}, {"name": "nonce", "type": "bytes32"}]
    message = {"authorizer": PAYER.account, "nonce": NONCE}
    signable = encode_typed_data(domain, {"CancelAuthorization": fields}, message)
    return vrs(bytes(EthAccount.sign_message(signable, signer.secret).signature))


async def test_a_cancelled_payment_cannot_be_made(coin: Coin) -> None:
    await coin.cancelAuthorization(RELAYER, PAYER.account, NONCE, *cancel_signature(coin))
    assert len(await coin.events(Coin.AuthorizationCanceled)) == 1
    payment = Payment()
    with pytest.raises(Conflict, match="authorization is used or canceled"):
        await coin.transferWithAuthorization(RELAYER, *payment.values, *vrs(payment.sign(coin)))


async def test_nobody_else_can_cancel(coin: Coin) -> None:
    with pytest.raises(Invalid, match="invalid signature"):
        await coin.cancelAuthorization(RELAYER, PAYER.account, NONCE, *cancel_signature(coin, RELAYER))
    assert not await coin.authorizationState(PAYER.account, NONCE)


async def test_money_one_does_not_have_cannot_be_paid(coin: Coin) -> None:
    with pytest.raises(PaymentRequired, match="transfer amount exceeds balance"):
        await coin.transfer(PAYER, PAYEE.account, 1_001)
    with pytest.raises(Invalid, match="bad receiver"):
        await coin.transfer(PAYER, ZERO, 1)


async def test_an_allowance_is_used_up_unless_it_is_the_maximum(coin: Coin) -> None:
    await coin.approve(PAYER, RELAYER.account, 5)
    await coin.transferFrom(RELAYER, PAYER.account, PAYEE.account, 3)
    with pytest.raises(Refused, match="transfer amount exceeds allowance"):
        await coin.transferFrom(RELAYER, PAYER.account, PAYEE.account, 3)
    await coin.approve(PAYER, RELAYER.account, 2**256 - 1)
    await coin.transferFrom(RELAYER, PAYER.account, PAYEE.account, 3)
    assert await coin.allowance(PAYER.account, RELAYER.account) == 2**256 - 1
    assert await coin.balanceOf(PAYEE.account) == 6


async def test_play_money_is_for_everybody_up_to_2_256(coin: Coin) -> None:
    await coin.mint(RELAYER, RELAYER.account, 7)
    assert (await coin.balanceOf(RELAYER.account), await coin.totalSupply()) == (7, 1_007)
    with pytest.raises(Invalid, match=r"supply exceeds 2\*\*256"):
        await coin.mint(RELAYER, RELAYER.account, 2**256 - 1)
    with pytest.raises(Invalid, match="bad receiver"):
        await coin.mint(RELAYER, ZERO, 1)


async def test_the_coin_says_what_it_is(coin: Coin) -> None:
    facts = [await coin.name(), await coin.symbol(), await coin.version(), await coin.decimals()]
    assert facts == ["Test USD", "tUSD", "2", 6]
