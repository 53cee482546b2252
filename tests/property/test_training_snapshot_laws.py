"""Laws of a snapshot: any k of n restore it, no k - 1 do, and every damaged byte is found and named."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.core.errors import Misbehaviour, Missing
from tessera.core.ids import RunId
from tessera.training import erasure
from tessera.training.snapshot_code import Sealed, open_snapshot, seal_snapshot
from tessera.training.snapshot_header import Moment
from training_world import peer_keys

MAKER, *HOLDERS = peer_keys(9)
CODES = [(k, n) for n in range(2, 9) for k in range(2, n + 1)]
codes = st.sampled_from(CODES)
states = st.binary(min_size=1, max_size=2000)


def seal(state: bytes, needed: int, count: int) -> Sealed:
    holders = [key.id for key in HOLDERS[:count]]
    return seal_snapshot(
        state,
        run_id=RunId("ab" * 32),
        stage=0,
        moment=Moment(1, 10),
        holders=holders,
        needed=needed,
        key=MAKER,
        secret=bytes(range(32)),
    )


def numbers_of(data: st.DataObject, count: int, size: int) -> list[int]:
    return data.draw(st.permutations(range(count)))[:size]


@settings(max_examples=60)
@given(states, codes, st.data())
def test_any_k_of_n_restore(state: bytes, code: tuple[int, int], data: st.DataObject) -> None:
    needed, count = code
    snapshot = seal(state, needed, count)
    fragments = {n: snapshot.fragments[n] for n in numbers_of(data, count, needed)}
    shares = {n: snapshot.shares[n] for n in numbers_of(data, count, needed)}
    assert open_snapshot(snapshot.header, fragments, shares).state == state


@settings(max_examples=60)
@given(states, codes, st.data())
def test_any_k_less_one_fail(state: bytes, code: tuple[int, int], data: st.DataObject) -> None:
    """Whether it is fragments or shares that are too few: with all fragments, k - 1 shares open nothing."""
    needed, count = code
    snapshot = seal(state, needed, count)
    few = numbers_of(data, count, needed - 1)
    everything = dict(enumerate(snapshot.fragments)), dict(enumerate(snapshot.shares))
    fragments, shares = {n: snapshot.fragments[n] for n in few}, {n: snapshot.shares[n] for n in few}
    for lacking in ((fragments, everything[1]), (everything[0], shares), (fragments, shares)):
        with pytest.raises(Missing) as caught:
            open_snapshot(snapshot.header, *lacking)
        assert caught.value.fields["have"] == needed - 1


@settings(max_examples=60)
@given(states, codes, st.data())
def test_every_damaged_byte_is_found_and_named(state: bytes, code: tuple[int, int], data: st.DataObject) -> None:
    needed, count = code
    snapshot = seal(state, needed, count)
    liar = data.draw(st.integers(0, count - 1))
    fragments, shares = dict(enumerate(snapshot.fragments)), dict(enumerate(snapshot.shares))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(fragments[liar]) - 1))
        flip = data.draw(st.integers(1, 255))
        fragments[liar] = bytes(b ^ (flip if i == place else 0) for i, b in enumerate(fragments[liar]))
    else:
        place = data.draw(st.integers(0, 199))  # a share has more, how many varies
        shares[liar] = shares[liar][:place] + "?" + shares[liar][place + 1 :]
    if count > needed:
        found = open_snapshot(snapshot.header, fragments, shares)
        assert (found.state, found.wrong) == (state, (HOLDERS[liar].id,))
    else:
        with pytest.raises(Misbehaviour) as caught:
            open_snapshot(snapshot.header, fragments, shares)
        assert caught.value.evidence["peers"] == [HOLDERS[liar].id]


@pytest.mark.parametrize(("needed", "count"), CODES)
def test_every_choice_of_k_pieces_decodes(needed: int, count: int) -> None:
    """Not so for Vandermonde's matrix in general; for Cauchy's every square part is invertible."""
    data = bytes(range(251)) * 3
    pieces = erasure.encode(data, needed, count)
    for chosen in itertools.combinations(range(count), needed):
        assert erasure.decode({n: pieces[n] for n in chosen}, len(data), needed, count) == data


def _times(a: int, b: int) -> int:
    """In GF(2^8) with the polynomial 0x11d."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a, b = (a << 1) ^ (0x11D if a & 0x80 else 0), b >> 1
    return product


@pytest.mark.parametrize(("needed", "count"), [(2, 2), (2, 3), (3, 5), (5, 9), (9, 16)])
def test_pieces_are_what_the_specification_says(needed: int, count: int) -> None:
    """specs/snapshots.md, computed by its formula: whoever has another library can restore too."""
    data = bytes(range(1, 102))
    length = -(-len(data) // needed)
    padded = data.ljust(needed * length, b"\0")
    rows = [padded[j * length : (j + 1) * length] for j in range(needed)]
    inverse = {a: next(b for b in range(1, 256) if _times(a, b) == 1) for a in range(1, 32)}
    for i, piece in enumerate(erasure.encode(data, needed, count)):
        expected = bytes(length) if i >= needed else rows[i]
        for j in range(needed if i >= needed else 0):
            factor = inverse[i ^ j]
            expected = bytes(e ^ _times(factor, x) for e, x in zip(expected, rows[j], strict=True))
        assert piece == expected


def test_k_less_one_shares_fit_every_secret() -> None:
    """With k - 1 shares, each value of the k-th gives a key: they exclude nothing but what SLIP-39's check sieves.

    So we count how often the library's own check lets a guess pass: never by chance in this many, as 2^-32 says.
    """
    from shamir_mnemonic import MnemonicError
    from shamir_mnemonic.shamir import RawShare, _interpolate, _recover_secret
    from shamir_mnemonic.share import Share

    shares = [Share.from_mnemonic(text) for text in erasure.split_secret(bytes(32), 2, 3)]
    known, true = RawShare(shares[0].index, shares[0].value), RawShare(shares[1].index, shares[1].value)
    keys = set()
    for guess in range(256):
        guessed = RawShare(true.x, bytes([guess]) + true.data[1:])
        keys.add(_interpolate([known, guessed], 255)[0])
        if guessed != true:
            with pytest.raises(MnemonicError):
                _recover_secret(2, [known, guessed])
    assert keys == set(range(256))
