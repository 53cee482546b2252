"""What the chain says of a signed payment: whether it can still move money, and whether it did.

An EIP-3009 authorization has a nonce at its coin, which tells in an event that it was used. A payment through Permit2
has a bit at Permit2, which tells only of bits that their owner crossed out; and nobody but the facilitator that was
signed can use the others. So a bit that is set and was not crossed out has paid.
"""

from __future__ import annotations

from eth_abi.abi import decode as abi_decode
from eth_abi.abi import encode as abi_encode

from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.serving.income.vouchers import PERMIT2
from tessera.serving.paying.facilitator import PaymentChain
from tessera.serving.paying.ledger import PaymentName

__all__ = ["PERMIT2_PREFIX", "balance_of", "has_moved", "is_used"]

PERMIT2_PREFIX = "permit2:"  # of the nonces that are Permit2's
AUTHORIZATION_USED = keccak(b"AuthorizationUsed(address,bytes32)")
CROSSED_OUT = keccak(b"UnorderedNonceInvalidation(address,uint256,uint256)")
AUTHORIZATION_BLOCKS = 2_000  # how far back the event is looked for: an hour at 2 s a block
PERMIT2_BLOCKS = 50_000  # a day at 2 s a block, which is how long a payment in doubt is remembered


async def is_used(chain: PaymentChain, asset: Account, name: PaymentName) -> bool:
    """Whether the payment can move nothing any more: it has, or its payer cancelled it."""
    if (nonce := _permit2_nonce(name)) is None:
        words = abi_encode(["address", "bytes32"], [name.payer, bytes.fromhex(name.nonce[2:])])
        return bool(await _read(chain, asset, "authorizationState(address,bytes32)", words))
    words = abi_encode(["address", "uint256"], [name.payer, nonce >> 8])
    return bool(await _read(chain, PERMIT2, "nonceBitmap(address,uint256)", words) >> (nonce & 255) & 1)


async def has_moved(chain: PaymentChain, asset: Account, name: PaymentName) -> bool:
    """Whether a payment that is used moved money, rather than being cancelled by its payer."""
    head, payer = await chain.block_number(), bytes.fromhex(name.payer[2:]).rjust(32, b"\0")
    if (nonce := _permit2_nonce(name)) is None:
        topics = [AUTHORIZATION_USED, payer, bytes.fromhex(name.nonce[2:])]
        return bool(await chain.logs(asset, topics, max(0, head - AUTHORIZATION_BLOCKS)))
    for log in await chain.logs(PERMIT2, [CROSSED_OUT, payer], max(0, head - PERMIT2_BLOCKS)):
        word, mask = abi_decode(["uint256", "uint256"], log.data)
        if word == nonce >> 8 and mask >> (nonce & 255) & 1:
            return False
    return True


async def balance_of(chain: PaymentChain, asset: Account, payer: str) -> int:
    return await _read(chain, asset, "balanceOf(address)", abi_encode(["address"], [payer]))


def _permit2_nonce(name: PaymentName) -> int | None:
    return int(name.nonce.removeprefix(PERMIT2_PREFIX)) if name.nonce.startswith(PERMIT2_PREFIX) else None


async def _read(chain: PaymentChain, contract: Account, signature: str, arguments: bytes) -> int:
    return int.from_bytes((await chain.call(contract, keccak(signature.encode())[:4] + arguments))[:32], "big")
