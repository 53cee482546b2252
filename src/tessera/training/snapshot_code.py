r"""A stage's state in n pieces: any k holders together give it back, any k - 1 read nothing.

    s            32 fresh random bytes
    κ          = SHA-256("tessera/snapshot/1" ‖ 0 ‖ s ‖ core)            core: run, stage, session, step, size, hash, k
    c_j        = XChaCha20-Poly1305(κ, nonce j, m_j)                      m_j: 4 MiB of the state, the last one shorter
    fragment_i = RS_i(c_0) ‖ RS_i(c_1) ‖ …                                Reed-Solomon, k of n: `erasure`
    share_i    = Shamir_i(s)                                              k of n

The header names the hash of every fragment and share and is signed by whoever made the snapshot: a code gives wrong
data in silence for one flipped bit, so what does not hash right is dropped, and its holder named. Memory at the peak:
1 + (n + 1) / k times the state to seal it, three times to open it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
)
from nacl.exceptions import CryptoError

from tessera.core.errors import Invalid, Misbehaviour, Missing
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.training import erasure
from tessera.training.snapshot_header import SEGMENT, TAG, Moment, Piece, SnapshotHeader

__all__ = ["Opened", "Sealed", "open_snapshot", "seal_snapshot", "share_hash"]

PURPOSE = b"tessera/snapshot/1\0"
NONCE_BYTES = 24


@dataclass(frozen=True, slots=True)
class Sealed:
    """A snapshot ready to be spread: piece i, a fragment and a share, is for the header's holder i."""

    header: SnapshotHeader
    fragments: tuple[bytes, ...]
    shares: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """A state that is the one its maker signed, and who of the holders served something else."""

    state: bytes
    wrong: tuple[PeerId, ...]


def seal_snapshot(
    state: bytes,
    *,
    run_id: RunId,
    stage: int,
    moment: Moment,
    holders: Sequence[PeerId],
    needed: int,
    key: PeerKey,
    secret: bytes,
) -> Sealed:
    """Cut `state` into one piece for each of `holders`.

    Args:
        holders: 2 to 16, each once, in the order of the pieces.
        needed: how many of them give it back, at least 2.
        key: the maker's, who is none of the holders.
        secret: 32 bytes, fresh for every snapshot (`secrets.token_bytes(32)`); forgotten afterwards.

    Raises: Invalid for what no header can say; Unavailable without pyeclib.
    Cost: 100 to 150 MB/s on one core; run it in a thread.
    """
    shares = erasure.split_secret(secret, needed, len(holders))
    blank = tuple(Piece(holder, "0" * 64, share_hash(share)) for holder, share in zip(holders, shares, strict=True))
    header = SnapshotHeader(
        run_id, stage, moment.session, moment.step, len(state), sha256(state).hex(), needed, blank, key.id
    )
    fragments = _fragments(state, header, _key(secret, header))
    pieces = tuple(
        replace(piece, fragment=sha256(fragment).hex()) for piece, fragment in zip(blank, fragments, strict=True)
    )
    return Sealed(replace(header, pieces=pieces).signed_by(key), tuple(fragments), tuple(shares))


def open_snapshot(header: SnapshotHeader, fragments: Mapping[int, bytes], shares: Mapping[int, str]) -> Opened:
    """The state, from what the holders of these numbers served.

    What is not what the header names is dropped. Raises: Missing, with `have` and `needed`, when too little is left;
    Misbehaviour when that is because holders served something else (`peers` names them), or when the pieces are right
    and the maker's own word is false; Unavailable without pyeclib.
    Cost: 150 to 250 MB/s on one core; run it in a thread.
    """
    good = {n: data for n, data in fragments.items() if _is(header, n, "fragment", sha256(data).hex())}
    words = {n: text for n, text in shares.items() if _is(header, n, "share", share_hash(text))}
    bad = sorted((fragments.keys() - good.keys()) | (shares.keys() - words.keys()))
    wrong = tuple(header.pieces[n].holder for n in bad if 0 <= n < header.count)
    have = min(len(good), len(words))
    if have < header.needed and wrong:
        names = ", ".join(f"{peer[:16]}…" for peer in wrong)
        raise Misbehaviour(
            f"{have} of {header.needed} pieces are right: {names} served something else",
            evidence={"snapshot": header.digest, "peers": list(wrong)},
            have=have,
            needed=header.needed,
        )
    if have < header.needed:
        raise Missing(
            f"{have} pieces of this snapshot are here, {header.needed} of {header.count} needed",
            have=have,
            needed=header.needed,
        )
    try:
        secret = erasure.join_secret(list(words.values()), header.needed)
        state = _join(header, good, _key(secret, header))
    except (Invalid, CryptoError) as error:
        raise _maker_lies(header, f"its pieces do not decrypt: {error}") from error
    if sha256(state).hex() != header.state:
        raise _maker_lies(header, "its pieces hold another state than it says")
    return Opened(state, wrong)


def share_hash(share: str) -> str:
    """What a header says of a share of the key."""
    return sha256(share.encode(errors="surrogatepass")).hex()


def _fragments(state: bytes, header: SnapshotHeader, key: bytes) -> list[bytes]:
    parts: list[list[bytes]] = [[] for _ in header.pieces]
    view = memoryview(state)
    for number in range(header.segments):
        plain = bytes(view[number * SEGMENT : (number + 1) * SEGMENT])
        sealed = crypto_aead_xchacha20poly1305_ietf_encrypt(plain, None, _nonce(number), key)
        for part, piece in zip(parts, erasure.encode(sealed, header.needed, header.count), strict=True):
            part.append(piece)
    return [b"".join(parts.pop(0)) for _ in header.pieces]


def _join(header: SnapshotHeader, fragments: Mapping[int, bytes], key: bytes) -> bytes:
    state = bytearray()
    place = 0
    for number in range(header.segments):
        size = header.segment_bytes(number) + TAG
        end = place + erasure.piece_bytes(size, header.needed)
        pieces = {n: fragment[place:end] for n, fragment in fragments.items()}
        sealed = erasure.decode(pieces, size, header.needed, header.count)
        state += crypto_aead_xchacha20poly1305_ietf_decrypt(sealed, None, _nonce(number), key)
        place = end
    return bytes(state)


def _key(secret: bytes, header: SnapshotHeader) -> bytes:
    """Bound to the state's hash, so that no two states ever share a key, and a nonce may just count."""
    return sha256(PURPOSE, secret, header.core())


def _nonce(number: int) -> bytes:
    return number.to_bytes(NONCE_BYTES, "little")


def _is(header: SnapshotHeader, number: int, what: str, found: str) -> bool:
    return 0 <= number < header.count and getattr(header.pieces[number], what) == found


def _maker_lies(header: SnapshotHeader, what: str) -> Misbehaviour:
    return Misbehaviour(
        f"{header.maker[:16]}… signed a snapshot of stage {header.stage}, step {header.step}: {what}",
        evidence={"header": header.to_value(), "peers": [header.maker], "fault": what},
    )
