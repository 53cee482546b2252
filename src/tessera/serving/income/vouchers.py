"""Vouchers: what a worker looks at before it decodes for a gateway, and can check without trusting the gateway.

A **purchase** is a payment that its buyer has signed to the run's payee, as x402 sends it. An EIP-3009 authorization
(`exact`) can be put on the chain by anybody who holds it, the worker too; once it is there, it is found there. One
through Permit2 (`upto`) only its facilitator can put there, who also says how much.
A **voucher** is the gateway's signature under: of this purchase, this session may take so many tokens, prompt and
completion together. It is bound to session, run, chain and gateway, and expires.

Invariants: a voucher's bytes are canonical, and signed for nothing else; what comes from a peer is checked field by
field before it is used; money is integers, and tokens are rounded so that none is served below the manifest's price.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from tessera.core import encoding
from tessera.core.errors import Invalid, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import Account, PeerId, RunId, parse_account, parse_peer_id
from tessera.core.signing import AccountKey, PeerKey, recover_account, verify_peer
from tessera.core.typed_data import domain, struct_hash, typed_digest

__all__ = ["MAX_VALID_S", "PAYER", "PERMIT2", "Payer", "Purchase", "Terms", "Voucher", "purchase_of"]

DOMAIN = "voucher"
TRANSFER = (
    "TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,"
    "bytes32 nonce)"
)
PERMIT2 = parse_account("0x000000000022D473030F116dDEE9F6B43aC78BA3")  # as in chain/genesis.py, which brings an EVM
UPTO_PROXY = parse_account("0x4020A4f3b7b90ccA423B9fabCc0CE57C6C240002")
PERMIT2_DOMAIN = "EIP712Domain(string name,uint256 chainId,address verifyingContract)"
PERMITTED = "TokenPermissions(address token,uint256 amount)"
WITNESS = "Witness(address to,address facilitator,uint256 validAfter)"
PERMIT = (
    "PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,uint256 deadline,"
    f"Witness witness){PERMITTED}{WITNESS}"
)
MAX_VALID_S = 3_600  # from now to the end of a voucher
MAX_TOKENS = 2**31
SESSION_CHARACTERS = 32


@dataclass(frozen=True, slots=True)
class Terms:
    """What a run's workers serve for: `price_units` of `asset`, paid to `pay_to`, buy `price_tokens` tokens."""

    run_id: RunId
    chain_id: int
    asset: Account
    asset_name: str  # as in the coin's EIP-712 domain
    asset_version: str
    pay_to: Account
    price_units: int
    price_tokens: int

    def __post_init__(self) -> None:
        if self.price_units <= 0 or self.price_tokens <= 0:
            raise Invalid(f"a price of {self.price_units} units for {self.price_tokens} tokens: both are above 0")

    def cost_up(self, tokens: int) -> int:
        """What `tokens` cost, rounded against the buyer."""
        return -(-tokens * self.price_units // self.price_tokens)

    def cost_down(self, tokens: int) -> int:
        """The least that `tokens` may be settled for, when they are metered."""
        return tokens * self.price_units // self.price_tokens


@dataclass(frozen=True, slots=True)
class Purchase:
    """What a buyer has signed: `value` units from `payer` to the run's payee. Times in seconds since 1970."""

    payer: Account
    value: int
    valid_after: int
    valid_before: int
    nonce: bytes  # 32
    signature: bytes  # 65: r, s, v
    facilitator: Account | None = None  # who alone can carry it, and sets the amount, by x402's `upto`

    @property
    def name(self) -> str:
        """The same authorization, and no other of this asset."""
        kind = "" if self.facilitator is None else "permit2:"
        return f"{self.payer}/{kind}{self.nonce.hex()}"

    @property
    def vrs(self) -> tuple[int, bytes, bytes]:
        return self.signature[64], self.signature[:32], self.signature[32:64]

    def digest(self, terms: Terms) -> bytes:
        if self.facilitator is not None:
            return self._permit(terms, self.facilitator)
        separator = domain(terms.asset_name, terms.asset_version, terms.chain_id, terms.asset)
        values = (self.payer, terms.pay_to, self.value, self.valid_after, self.valid_before, self.nonce)
        return typed_digest(separator, TRANSFER, values)

    def _permit(self, terms: Terms, facilitator: Account) -> bytes:
        """What Permit2 hashes: a transfer of at most `value` by x402's proxy, to the payee that the witness names."""
        separator = struct_hash(PERMIT2_DOMAIN, ["Permit2", terms.chain_id, PERMIT2])
        permitted = struct_hash(PERMITTED, [terms.asset, self.value])
        witness = struct_hash(WITNESS, [terms.pay_to, facilitator, self.valid_after])
        nonce, spender = self.nonce, bytes(12) + bytes.fromhex(UPTO_PROXY[2:])
        words = (keccak(PERMIT.encode()), permitted, spender, nonce, self.valid_before.to_bytes(32, "big"), witness)
        return keccak(b"\x19\x01" + separator + keccak(b"".join(words)))

    def signed_by(self, key: AccountKey, terms: Terms) -> Purchase:
        mine = replace(self, payer=key.account)
        return replace(mine, signature=key.sign_digest(mine.digest(terms)))

    def check(self, terms: Terms) -> None:
        """Raises `Refused` unless the payer signed this payment, in the run's asset, to the run's payee."""
        try:
            signer = recover_account(self.digest(terms), self.signature)
        except Invalid as error:
            raise Refused(f"the purchase is not signed: {error.message}", rule="purchase") from error
        if signer != self.payer:
            raise Refused(f"the purchase is not {self.payer}'s payment to {terms.pay_to}", rule="purchase")

    def to_value(self) -> list[Any]:
        times = [self.valid_after, self.valid_before]
        sealed = [self.nonce.hex(), self.signature.hex()]
        return [self.payer, self.value, *times, *sealed, self.facilitator or ""]

    @classmethod
    def from_value(cls, value: object) -> Purchase:
        """Raises `Invalid` for what is no purchase. The signature is not checked here."""
        if not isinstance(value, list) or len(value) != 7:
            raise Invalid("a purchase is a list of 7 fields")
        payer, units, after, before, nonce, signature, facilitator = value
        if any(type(number) is not int or not 0 <= number < 2**256 for number in (units, after, before)):
            raise Invalid("a purchase's amount and times are numbers of up to 256 bits")
        sealed = encoding.hex_bytes(nonce, 32), encoding.hex_bytes(signature, 65)
        carrier = None if facilitator == "" else parse_account(facilitator)
        return cls(parse_account(payer), units, after, before, *sealed, carrier)

    @classmethod
    def from_x402(cls, payload: dict[str, Any]) -> Purchase | None:
        """From the payload of an x402 payment that was checked; None for one that only a smart wallet can check."""
        signature = bytes.fromhex(str(payload["signature"])[2:])
        if len(signature) != 65:
            return None
        if (permit := payload.get("permit2Authorization")) is not None:
            witness, nonce = permit["witness"], int(permit["nonce"]).to_bytes(32, "big")
            after, before = int(witness["validAfter"]), int(permit["deadline"])
            payer, carrier = parse_account(permit["from"].lower()), parse_account(witness["facilitator"].lower())
            return cls(payer, int(permit["permitted"]["amount"]), after, before, nonce, signature, carrier)
        signed = payload["authorization"]
        value, after, before = (int(signed[name]) for name in ("value", "validAfter", "validBefore"))
        payer, nonce = parse_account(signed["from"].lower()), bytes.fromhex(signed["nonce"][2:])
        return cls(payer, value, after, before, nonce, signature)


@dataclass(frozen=True, slots=True)
class Voucher:
    """Of `purchase`, session `session` of `gateway` may take `tokens`, until `expires`."""

    run_id: RunId
    chain_id: int
    gateway: PeerId
    session: str
    tokens: int
    expires: int  # seconds since 1970
    purchase: Purchase
    signature: bytes = b""

    def message(self) -> bytes:
        return encoding.encode(
            {
                "run_id": self.run_id,
                "chain_id": self.chain_id,
                "gateway": self.gateway,
                "session": self.session,
                "tokens": self.tokens,
                "expires": self.expires,
                "purchase": self.purchase.to_value(),
            }
        )

    def signed_by(self, key: PeerKey) -> Voucher:
        mine = replace(self, gateway=key.id)
        return replace(mine, signature=key.sign(DOMAIN, mine.message()))

    def check(self, terms: Terms, now: float) -> None:
        """Raises `Refused`, with the broken rule, unless it is a voucher for this run and chain, valid now, and both
        its gateway and the buyer signed it."""
        if self.run_id != terms.run_id or self.chain_id != terms.chain_id:
            raise Refused("the voucher is for another run or chain", rule="voucher_elsewhere")
        if not now < self.expires <= now + MAX_VALID_S:
            raise Refused(
                f"the voucher ends at {self.expires}: within the next {MAX_VALID_S} s expected", rule="expired"
            )
        try:
            verify_peer(self.gateway, DOMAIN, self.message(), self.signature)
        except Invalid as error:
            raise Refused("the voucher is not its gateway's", rule="voucher") from error
        self.purchase.check(terms)

    def to_value(self) -> list[Any]:
        """The form that travels: without run and chain, which both sides know."""
        return [
            self.gateway, self.session, self.tokens, self.expires, self.purchase.to_value(), self.signature.hex()
        ]  # fmt: skip

    @classmethod
    def from_value(cls, terms: Terms, value: object) -> Voucher:
        """As said for the run of `terms`. Raises `Invalid` for what is no voucher. Signatures are not checked here."""
        if not isinstance(value, list) or len(value) != 6:
            raise Invalid("a voucher is a list of 6 fields")
        gateway, session, tokens, expires, purchase, signature = value
        if not isinstance(session, str) or len(session) != SESSION_CHARACTERS:
            raise Invalid(f"a session's name has {SESSION_CHARACTERS} characters")
        if type(tokens) is not int or not 0 < tokens <= MAX_TOKENS or type(expires) is not int or expires < 0:
            raise Invalid("a voucher has a number of tokens from 1, and a time")
        bought, sealed = Purchase.from_value(purchase), encoding.hex_bytes(signature, 64)
        return cls(terms.run_id, terms.chain_id, parse_peer_id(gateway), session, tokens, expires, bought, sealed)


@dataclass(frozen=True, slots=True)
class Payer:
    """Who pays for a request, and with what, when its payment shows that."""

    caller: str = ""
    purchase: Purchase | None = None


PAYER: ContextVar[Payer] = ContextVar("payer", default=Payer())  # noqa: B039  it is frozen
"""Who pays for the request at hand. It goes with the request's tasks, as a trace does, because what lies between the
gateway and the engine over peers has no business with payments."""


@runtime_checkable
class _Bought(Protocol):
    @property
    def purchase(self) -> Purchase | None: ...


def purchase_of(hold: object) -> Purchase | None:
    """What a payment's hold can show to workers; None for one that only the gateway knows."""
    return hold.purchase if isinstance(hold, _Bought) else None
