"""Signing in with an Ethereum account (EIP-4361): a wallet signs a text of ours, and gets a session for it.

    GET  a text with a fresh nonce  ──▶  the wallet signs it  ──▶  POST text and signature  ──▶  a session's API key

Invariants: a signature opens one session, at one gateway of all that share the tables; only for the domain, chain and
account that stand in the signed text, which must be ours in every letter; only within the minutes that it names. What
is remembered of a sign-in ends when its text does, so that nobody can fill the table without an account's signature
for each row, and who asks for texts fills nothing: a nonce carries its own proof.

The text is built here and compared whole, never parsed for its meaning: a text that differs in anything is refused.
Source: https://eips.ethereum.org/EIPS/eip-4361, with a session's terms in its statement.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from eth_abi.abi import encode as abi_encode
from sqlalchemy import Column, Float, LargeBinary, MetaData, String, Table, delete, insert, select

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, Invalid, Refused, TesseraError, Unavailable
from tessera.core.hashing import keccak
from tessera.core.ids import Account, parse_account
from tessera.core.signing import recover_account
from tessera.serving.paying.keys import KeyRing
from tessera.storage.database import Transaction, open_database
from tessera.storage.layout import Layout
from tessera.storage.location import MEMORY

__all__ = ["Session", "SignIn", "SignInConfig"]

STATEMENT = "Open a session that may use my shares' tokens and my credit at this gateway. It moves no coins."
SKEW_S = 60  # another gateway's clock may be so much ahead
TEXT_LIMIT = 2_000  # characters of a signed text
SIGNATURE_LIMIT = 2_048  # bytes: a smart wallet's may be long
VALID_SIGNATURE = bytes.fromhex("1626ba7e")  # what a contract answers that takes a signature for its own (EIP-1271)
_NONCE = re.compile(r"(?P<stamp>[0-9a-f]{8})(?P<chance>[0-9a-f]{16})(?P<proof>[0-9a-f]{32})")
_FACTS = re.compile(r"\A[^\n]{1,300}\n(?P<account>0x[0-9a-fA-F]{40})\n.*\nNonce: (?P<nonce>[0-9a-f]{56})\n", re.DOTALL)

_TABLES = MetaData()
_SECRETS = Table(
    "sign_in_secrets", _TABLES, Column("name", String, primary_key=True), Column("secret", LargeBinary, nullable=False)
)
_USED = Table(
    "sign_in_used",
    _TABLES,
    Column("nonce", String, primary_key=True),
    Column("until", Float(53), nullable=False, index=True),  # seconds since 1970
)
_LAYOUT = Layout("sign_ins", _TABLES)


class WalletChain(Protocol):
    """What signing in asks of a chain: whether a smart wallet takes a signature for its own."""

    async def call(self, to: Account, data: bytes) -> bytes: ...
    async def code(self, account: Account) -> bytes: ...


@dataclass(frozen=True, slots=True)
class SignInConfig:
    """Where and for how long. Times in seconds."""

    origin: str  # scheme and host as users see them, such as https://gateway.example
    chain_id: int
    text_s: int = 600  # from asking for the text to signing it
    session_s: int = 12 * 3600

    def __post_init__(self) -> None:
        if re.fullmatch(r"https?://[^/\s?#@]+", self.origin) is None:
            raise Invalid(f"the origin is scheme and host, such as https://gateway.example, not {self.origin[:200]!r}")


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who has signed in. `until` in seconds since 1970."""

    account: Account
    api_key: str
    until: float


class SignIn:
    """Opens sessions.

    Args:
        where: a file, or a database's URL; gateways that share it take each signature once among them.
    """

    def __init__(
        self,
        config: SignInConfig,
        keys: KeyRing,
        chain: WalletChain,
        clock: Clock,
        *,
        where: str | Path = MEMORY,
        schema: str = "",
    ) -> None:
        self._config, self._keys, self._chain, self._clock = config, keys, chain, clock
        self._db = open_database(where, _LAYOUT, schema=schema, durability="full")
        self._secret = self._db.apply(_shared_secret)

    def text(self, account: object) -> str:
        """What `account` is to sign. Raises: Invalid when it is no account."""
        stamp = f"{int(self._clock.time()):08x}"
        chance = secrets.token_hex(8)
        owner = parse_account(account)
        return self._text(owner, stamp + chance + self._proof(owner, stamp + chance))

    async def open(self, text: str, signature: str) -> Session:
        """A session for who has signed `text`.

        Raises: Refused, whose rule says what is wrong with it; Unavailable when that cannot be known now.
        """
        account, nonce = self._check(text)
        signed = text.encode()
        digest = keccak(b"\x19Ethereum Signed Message:\n%d" % len(signed) + signed)
        if not await self._signed(account, digest, _bytes(signature)):
            raise Refused(f"the signature is not that of {account}", rule="signature")
        if not await self._use(nonce, self._ends(nonce)):
            raise Refused("this signature has opened a session before: ask for a new text", rule="nonce_used")
        until = self._clock.time() + self._config.session_s
        return Session(account, await self._keys.issue("session", account, until=until), until)

    def close(self) -> None:
        self._db.close()

    def _check(self, text: str) -> tuple[Account, str]:
        """Whose text it is, and its nonce. Raises: Refused for any text but one that we have made, and lately."""
        facts = _FACTS.match(text) if len(text) <= TEXT_LIMIT else None
        if facts is None:
            raise Refused("this is no text of ours to sign", rule="text")
        try:
            account = parse_account(facts["account"])
        except Invalid as error:
            raise Refused("the text names no account", rule="text") from error
        nonce = facts["nonce"]
        if not hmac.compare_digest(text.encode(errors="replace"), self._text(account, nonce).encode()):
            raise Refused("the text is not ours: another domain, chain, statement or time", rule="text")
        if not hmac.compare_digest(nonce[24:], self._proof(account, nonce[:24])):
            raise Refused("the nonce is not ours", rule="nonce")
        if not -SKEW_S <= self._clock.time() - int(nonce[:8], 16) < self._config.text_s:
            raise Refused("the text has expired: ask for a new one", rule="expired")
        return account, nonce

    def _text(self, account: Account, nonce: str) -> str:
        made = int(nonce[:8], 16)
        host = self._config.origin.partition("://")[2]
        return (
            f"{host} wants you to sign in with your Ethereum account:\n{account}\n\n{STATEMENT}\n\n"
            f"URI: {self._config.origin}/v1/sign-in\nVersion: 1\nChain ID: {self._config.chain_id}\nNonce: {nonce}\n"
            f"Issued At: {_iso(made)}\nExpiration Time: {_iso(made + self._config.text_s)}"
        )

    def _proof(self, account: Account, nonce: str) -> str:
        return hmac.new(self._secret, f"{account} {nonce}".encode(), "sha256").hexdigest()[:32]

    def _ends(self, nonce: str) -> float:
        return int(nonce[:8], 16) + self._config.text_s

    async def _signed(self, account: Account, digest: bytes, signature: bytes) -> bool:
        try:
            if len(signature) == 65 and recover_account(digest, signature) == account:
                return True
        except TesseraError:
            pass  # a smart wallet's signature need not be one of an account
        if not await self._chain.code(account):
            return False
        asked = keccak(b"isValidSignature(bytes32,bytes)")[:4] + abi_encode(["bytes32", "bytes"], [digest, signature])
        try:
            return (await self._chain.call(account, asked))[:4] == VALID_SIGNATURE
        except Unavailable:
            raise
        except TesseraError:  # it reverts
            return False

    async def _use(self, nonce: str, until: float) -> bool:
        """Crosses the nonce out; False when it was already."""
        now = self._clock.time()

        def work(db: Transaction) -> bool:
            db.execute(delete(_USED).where(_USED.c.until <= now))
            if db.execute(select(_USED.c.nonce).where(_USED.c.nonce == nonce)).first() is not None:
                return False
            db.execute(insert(_USED), {"nonce": nonce, "until": until})
            return True

        try:
            return await self._db.apply_async(work)
        except Conflict as error:
            raise Unavailable(f"{error.message}; sign in again") from error


def _shared_secret(db: Transaction) -> bytes:
    """Of all gateways on this database, so that each knows the others' nonces."""
    db.add(_SECRETS, [{"name": "nonce", "secret": secrets.token_bytes(32)}])
    return bytes(db.execute(select(_SECRETS.c.secret)).scalar_one())


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _bytes(text: str) -> bytes:
    try:
        signature = bytes.fromhex(text.removeprefix("0x"))
    except ValueError as error:
        raise Refused("the signature is not hex", rule="signature") from error
    if len(signature) > SIGNATURE_LIMIT:
        raise Refused(f"a signature of {len(signature)} bytes, at most {SIGNATURE_LIMIT} expected", rule="signature")
    return signature
