"""What an operator signs about its ledger, so that a fork shown to two members is proved by the operator's own hand.

A member replays the journal alone; that a friend was shown another one, it cannot see. So each member asks for a signed
head, a height with the hash of its block, and members pass them on to each other, over any channel that they have. A
block's hash commits to all blocks before it. Two heads of one height with two hashes and one signer are evidence that
needs no witness; heads of different heights are brought to one by asking for the head at the other's height, and the
replay settles what the operator then says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import anyio.from_thread
import anyio.to_thread

from tessera.chain.genesis import Genesis
from tessera.chain.journal import Entry
from tessera.chain.replay import verify_journal
from tessera.core.errors import Invalid, Misbehaviour, Refused
from tessera.core.ids import Account
from tessera.core.signing import AccountKey, recover_account
from tessera.core.typed_data import domain, typed_digest

__all__ = ["Checked", "SignedHead", "check_operator", "contradiction", "sign_head"]

PAGE = 500  # journal entries in one request
Request = Callable[[str, list[Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class SignedHead:
    """`signer` says: on my chain `chain_id`, the block at height `number` has this hash."""

    chain_id: int
    number: int
    hash: bytes
    signature: bytes

    @property
    def signer(self) -> Account:
        """Raises `Invalid` for a signature that is nobody's."""
        return recover_account(_digest(self.chain_id, self.number, self.hash), self.signature)

    def to_value(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "chainId": self.chain_id, "number": self.number, "hash": "0x" + self.hash.hex(),
            "signature": "0x" + self.signature.hex(),
        }  # fmt: skip

    @classmethod
    def from_value(cls, value: Any) -> SignedHead:
        """From a peer's JSON; the signature is somebody's. Raises `Invalid`."""
        try:
            chain_id, number = value["chainId"], value["number"]
            block_hash, signature = (bytes.fromhex(value[name].removeprefix("0x")) for name in ("hash", "signature"))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise Invalid(f"not a signed head: {error!r}") from error
        if any(type(part) is not int or not 0 <= part < 2**63 for part in (chain_id, number)) or len(block_hash) != 32:
            raise Invalid("a signed head has a chain id, a height and a hash of 32 bytes")
        head = cls(chain_id, number, block_hash, signature)
        _ = head.signer
        return head


@dataclass(frozen=True, slots=True)
class Checked:
    """A ledger that was replayed and agrees with all that was seen of it."""

    head: SignedHead  # pass it on: the next member compares with it
    state_root: bytes
    genesis: Genesis


def sign_head(key: AccountKey, chain_id: int, number: int, block_hash: bytes) -> SignedHead:
    """The operator's word."""
    return SignedHead(chain_id, number, block_hash, key.sign_digest(_digest(chain_id, number, block_hash)))


def contradiction(one: SignedHead, other: SignedHead) -> Misbehaviour | None:
    """The proof that their signer shows two histories; None when they can both be true."""
    if (one.chain_id, one.number) != (other.chain_id, other.number) or one.hash == other.hash:
        return None
    if one.signer != other.signer:
        return None
    evidence = {"signer": one.signer, "heads": [one.to_value(), other.to_value()]}
    return Misbehaviour(
        f"a fork: {one.signer} has signed two different blocks at height {one.number}", evidence=evidence
    )


async def check_operator(
    request: Request, chain_id: int, *, operator: Account | None = None, seen: Sequence[SignedHead] = ()
) -> Checked:
    """Replay an operator's ledger, and compare it with what oneself and other members were shown.

    Args:
        request: JSON-RPC to the operator.
        operator: who must have signed; None means whoever signed the first head that comes.
        seen: heads that other members passed on, and those of earlier checks.

    Raises: `Misbehaviour` for a fork, for blocks that were shown and are gone, and for a journal that does not lead
        where it says; `evidence` holds the heads. `Refused` (rule "operator") for heads of another signer. As the
        requests for an operator who does not answer, which proves nothing: ask again, then ask the others.

    Cost: the whole journal over the wire, and about 2 ms a block; runs in a thread.
    """
    head = await _head(request, chain_id)
    operator = operator or head.signer
    for one in (head, *seen):
        if one.chain_id != chain_id or one.signer != operator:
            raise Refused(
                f"a head of chain {one.chain_id} by {one.signer}, expected chain {chain_id} by {operator}",
                rule="operator",
            )
    for earlier in seen:
        for other in seen:
            if found := contradiction(earlier, other):
                raise found
        if earlier.number > head.number:
            evidence = {"signer": operator, "heads": [head.to_value(), earlier.to_value()]}
            raise Misbehaviour(
                f"block {earlier.number} was shown, and the ledger ends at {head.number}", evidence=evidence
            )
        if found := contradiction(earlier, await _head(request, chain_id, earlier.number)):
            raise found
    genesis = Genesis.from_value(await request("tessera_genesis", []))
    known = {one.number: one.hash for one in (*seen, head)}

    def replayed() -> bytes:
        entries = _entries(request, head.number)
        return verify_journal(entries, chain_id=chain_id, genesis=genesis, known=known).state_root

    try:
        root = await anyio.to_thread.run_sync(replayed)
    except Misbehaviour as error:
        evidence = {"signer": operator, "heads": [one.to_value() for one in (head, *seen)], "found": error.evidence}
        raise Misbehaviour(error.message, evidence=evidence) from error
    return Checked(head, root, genesis)


async def _head(request: Request, chain_id: int, number: int | None = None) -> SignedHead:
    head = SignedHead.from_value(await request("tessera_head", [] if number is None else [hex(number)]))
    if number is not None and head.number != number:
        raise Misbehaviour(f"asked for the head at {number}, got one at {head.number}", evidence=head.to_value())
    if head.chain_id != chain_id:
        raise Invalid(f"a head of chain {head.chain_id}, this is chain {chain_id}")
    return head


def _entries(request: Request, last: int) -> Iterator[Entry]:
    """The journal up to block `last`, fetched as it is replayed: what is wrong ends the download. In a thread."""

    async def ask(first: int) -> Any:
        return await request("tessera_journal", [hex(first), hex(min(PAGE, last + 1 - first))])

    first = 0
    while first <= last:
        page = anyio.from_thread.run(ask, first)
        if not isinstance(page, list) or not 1 <= len(page) <= PAGE:
            raise Misbehaviour(f"the journal has no block {first}, though block {last} was signed", evidence=last)
        yield from (Entry.from_value(value) for value in page)
        first += len(page)


def _digest(chain_id: int, number: int, block_hash: bytes) -> bytes:
    """EIP-712, so that no signature for another purpose can be shown as this one."""
    separator = domain("Tessera chain head", "1", chain_id)
    return typed_digest(separator, "Head(uint256 number,bytes32 blockHash)", (number, block_hash))
