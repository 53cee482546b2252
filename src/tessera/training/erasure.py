"""Any k of n pieces give the data back: a Cauchy Reed-Solomon code over bytes, and Shamir's scheme for a secret.

Both find nothing wrong by themselves: a flipped bit in a piece decodes to other data in silence. Callers hash pieces.

The code is liberasurecode's `isa_l_rs_cauchy`, through pyeclib. Of Intel's two matrices only Cauchy's is invertible for
every choice of k rows. liberasurecode puts 80 bytes in front of each piece, and believes what stands there when it
decodes; they follow from k, n and the length, so we cut them off, and put our own back: no header from a peer is ever
parsed in C. The scheme is SLIP-39's, in one group and without a passphrase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tessera.core.errors import Invalid, Missing, Unavailable

__all__ = ["MAX_PIECES", "SHARE_LIMIT", "check_code", "decode", "encode", "join_secret", "piece_bytes", "split_secret"]

MAX_PIECES = 16  # SLIP-39's limit
HEADER_BYTES = 80  # of liberasurecode
SHARE_LIMIT = 512  # characters; a share of 32 bytes is 33 words, about 240
_FIX = "pip install 'tessera-network[train]' on Linux, the only system that pyeclib has wheels for"


def check_code(needed: int, count: int) -> None:
    """Raises `Invalid` unless 2 ≤ needed ≤ count ≤ 16: with one piece enough, its holder could read alone."""
    if not 2 <= needed <= count <= MAX_PIECES:
        raise Invalid(f"a code has 2 ≤ needed ≤ pieces ≤ {MAX_PIECES}, not {needed} of {count}")


def piece_bytes(size: int, needed: int) -> int:
    """Bytes of each piece of `size` bytes of data: ⌈size / k⌉.

    >>> piece_bytes(100, 3)
    34
    """
    return -(-size // needed)


def encode(data: bytes, needed: int, count: int) -> list[bytes]:
    """`count` pieces of which any `needed` give `data` back; the first `needed` are the data itself, cut.

    Raises: Invalid for another code than `check_code` allows, or no data; Unavailable without pyeclib.
    Cost: 300 to 600 MB/s on one core.
    """
    check_code(needed, count)
    if not data:
        raise Invalid("there is nothing to encode")
    pieces = [piece[HEADER_BYTES:] for piece in _driver(needed, count).encode(data)[:count]]
    if {len(piece) for piece in pieces} != {piece_bytes(len(data), needed)}:
        raise RuntimeError(f"pyeclib cuts {len(data)} bytes into pieces of {len(pieces[0])}: install pyeclib==1.8.0")
    return pieces


def decode(pieces: Mapping[int, bytes], size: int, needed: int, count: int) -> bytes:
    """The `size` bytes that were encoded, from pieces by their number. They must have been checked.

    Raises: Missing for fewer than `needed`; Invalid for a piece that cannot be one; Unavailable without pyeclib.
    """
    check_code(needed, count)
    length = piece_bytes(size, needed)
    for number, piece in pieces.items():
        if not 0 <= number < count or len(piece) != length or size < 1:
            raise Invalid(f"piece {number} of {count} has {len(piece)} bytes, {length} expected")
    if len(pieces) < needed:
        raise Missing(f"{len(pieces)} of {needed} pieces are here", have=len(pieces), needed=needed)
    heads = _heads(size, needed, count)
    chosen = sorted(pieces)[:needed]  # the data itself first: nothing to compute
    return bytes(_driver(needed, count).decode([heads[number] + pieces[number] for number in chosen]))


def split_secret(secret: bytes, needed: int, count: int) -> list[str]:
    """`count` lists of words of which any `needed` give the 32 bytes back.

    Fewer say nothing of it but for SLIP-39's check: whoever holds `needed - 1` can sieve guesses by 32 bits, which
    leaves 224 of 256. Raises: Invalid; Unavailable without shamir-mnemonic. Cost: 6 ms.
    """
    check_code(needed, count)
    if len(secret) != 32:
        raise Invalid(f"a secret has 32 bytes, not {len(secret)}")
    groups = _shamir().generate_mnemonics(1, [(needed, count)], secret, iteration_exponent=0)
    return list(groups[0])


def join_secret(shares: Sequence[str], needed: int) -> bytes:
    """The secret of `needed` shares or more. They must have been checked, but may be anything.

    Raises: Missing for fewer than `needed`; Invalid for shares that do not belong together or have another form;
    Unavailable without shamir-mnemonic.
    """
    shamir = _shamir()
    chosen = list(shares)[:needed]
    if len(chosen) < needed:
        raise Missing(f"{len(chosen)} of {needed} shares of the key are here", have=len(chosen), needed=needed)
    try:
        for text in chosen:
            if len(text) > SHARE_LIMIT:
                raise Invalid(f"a share of {len(text)} characters, at most {SHARE_LIMIT} expected")
            share = shamir.share.Share.from_mnemonic(text)
            # a share may ask for 2^15 times as much work: minutes of ours
            if (share.iteration_exponent, share.group_count, share.member_threshold) != (0, 1, needed):
                raise Invalid("a share of the key has another form than ours")
        secret = bytes(shamir.combine_mnemonics(chosen))
    except shamir.MnemonicError as error:
        raise Invalid(f"the shares of the key do not belong together: {error}") from error
    if len(secret) != 32:
        raise Invalid(f"the shares hold {len(secret)} bytes, 32 expected")
    return secret


@lru_cache(maxsize=8)
def _driver(needed: int, count: int) -> Any:
    try:
        from pyeclib.ec_iface import ECDriver
    except ImportError as error:
        raise Unavailable(f"snapshots need pyeclib: {_FIX}", retry_after_s=3600.0) from error
    # there is no code without parity: for n of n, one piece more is made and not used
    return ECDriver(k=needed, m=max(1, count - needed), ec_type="isa_l_rs_cauchy")


@lru_cache(maxsize=8)  # a snapshot has segments of two lengths
def _heads(size: int, needed: int, count: int) -> list[bytes]:
    """What liberasurecode puts in front of the pieces of any `size` bytes."""
    return [piece[:HEADER_BYTES] for piece in _driver(needed, count).encode(bytes(size))]


def _shamir() -> Any:
    try:
        import shamir_mnemonic
    except ImportError as error:
        raise Unavailable(f"snapshots need shamir-mnemonic: {_FIX}", retry_after_s=3600.0) from error
    return shamir_mnemonic
