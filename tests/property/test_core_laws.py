"""The laws of core, for all inputs."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tessera.core.amount import Amount
from tessera.core.encoding import MAX_INT_BITS, decode, encode
from tessera.core.errors import Invalid, TesseraError, UnitMismatch, from_dict
from tessera.core.ids import account_from_bytes, parse_account
from tessera.core.merkle import MerkleTree, fold
from tessera.core.signing import AccountKey, PeerKey, recover_account, verify_peer

UNITS = st.integers(0, 2**256 - 1)
ASSETS = st.sampled_from(["tUSD", "USDC", "wETH"])
AMOUNTS = st.builds(Amount, UNITS, st.just("tUSD"))
SEEDS = st.binary(min_size=32, max_size=32)
DOMAINS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
LIMIT = 10_000_000

# What `encode` takes: text without lone surrogates, bounded integers, finite floats.
TEXTS = st.text(st.characters(codec="utf-8"))
SCALARS = (
    st.none() | st.booleans() | TEXTS | st.integers(-(2**MAX_INT_BITS) + 1, 2**MAX_INT_BITS - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20)
# What `json.loads` can return at worst: the hostile side of the wire.
JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


# --- amounts


@given(AMOUNTS, AMOUNTS)
def test_subtraction_undoes_addition(a: Amount, b: Amount) -> None:
    assert (a + b) - b == a
    assert a + b == b + a


@given(UNITS, UNITS, ASSETS, ASSETS)
def test_assets_never_mix(a: int, b: int, one: str, other: str) -> None:
    assume(one != other)
    with pytest.raises(UnitMismatch):
        Amount(a, one) + Amount(b, other)
    with pytest.raises(UnitMismatch):
        Amount(a, one) <= Amount(b, other)  # noqa: B015 - the comparison itself must raise


@given(AMOUNTS, AMOUNTS)
def test_amounts_are_ordered_as_their_units(a: Amount, b: Amount) -> None:
    assert (a < b, a <= b, a > b, a >= b) == (
        a.units < b.units, a.units <= b.units, a.units > b.units, a.units >= b.units,
    )  # fmt: skip


@given(AMOUNTS, st.integers(0, 2**64), st.integers(1, 2**64))
def test_a_part_is_rounded_by_less_than_one_unit_and_in_the_named_direction(a: Amount, n: int, d: int) -> None:
    down, exact, up = a.part_down(n, d).units, Fraction(a.units * n, d), a.part_up(n, d).units
    assert down <= exact <= up
    assert exact - down < 1
    assert up - exact < 1


@given(AMOUNTS, st.lists(st.integers(0, 2**32), min_size=1, max_size=10))
def test_parts_rounded_down_never_exceed_the_whole(a: Amount, scores: list[int]) -> None:
    total = sum(scores)
    assume(total > 0)
    assert sum(a.part_down(score, total).units for score in scores) <= a.units


@given(AMOUNTS, st.integers(0, 30))
def test_parse_undoes_format(a: Amount, decimals: int) -> None:
    number, asset = a.format(decimals).split(" ")
    assert Amount.parse(number, asset, decimals) == a


@given(st.text(max_size=200), st.integers(0, 30))
@example("1" * 200, 0)
def test_any_text_is_an_amount_or_invalid(text: str, decimals: int) -> None:
    try:
        amount = Amount.parse(text, "tUSD", decimals)
    except Invalid:
        return
    assert Amount.parse(amount.format(decimals).split(" ")[0], "tUSD", decimals) == amount


# --- canonical encoding


def _same(a: Any, b: Any) -> bool:
    """Equality that tells 1 from 1.0 from True, and 0.0 from -0.0."""
    return repr(a) == repr(b)


@given(VALUES)
def test_decode_undoes_encode(value: Any) -> None:
    data = encode(value)
    decoded = decode(data, LIMIT)
    assert decoded == value
    assert encode(decoded) == data


@given(SCALARS)
def test_a_scalar_keeps_its_type_and_sign(value: Any) -> None:
    assert _same(decode(encode(value), LIMIT), value)


@given(st.dictionaries(TEXTS, SCALARS), st.randoms(use_true_random=False))
def test_the_order_of_insertion_leaves_no_trace(value: dict[str, Any], rng: Any) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert encode(dict(items)) == encode(value)


@given(VALUES)
def test_every_other_spelling_of_a_value_is_refused(value: Any) -> None:
    canonical = encode(value)
    spellings = {
        json.dumps(value).encode(),
        json.dumps(value, indent=1, sort_keys=True).encode(),
        json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode(),
        json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(),
        b" " + canonical,
        canonical + b"\n",
    }
    for spelling in spellings - {canonical}:
        with pytest.raises(Invalid):
            decode(spelling, LIMIT)


@given(st.binary(max_size=200))
def test_any_bytes_are_canonical_or_invalid(data: bytes) -> None:
    try:
        value = decode(data, 200)
    except Invalid:
        return
    assert encode(value) == data


@given(VALUES, st.data())
def test_one_changed_byte_is_another_value_or_invalid(value: Any, data: st.DataObject) -> None:
    encoded = bytearray(encode(value))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = decode(bytes(encoded), LIMIT)
    except Invalid:
        return
    assert not _same(changed, decode(encode(value), LIMIT))


# --- signing


@given(SEEDS, DOMAINS, st.binary(max_size=100))
def test_a_peers_own_signature_is_accepted(seed: bytes, domain: str, message: bytes) -> None:
    key = PeerKey(seed)
    verify_peer(key.id, domain, message, key.sign(domain, message))


@given(SEEDS, st.binary(max_size=100), st.integers(0, 511))
def test_a_flipped_bit_breaks_a_peers_signature(seed: bytes, message: bytes, bit: int) -> None:
    key = PeerKey(seed)
    signature = bytearray(key.sign("receipt", message))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Invalid):
        verify_peer(key.id, "receipt", message, bytes(signature))


@given(SEEDS, SEEDS, DOMAINS, DOMAINS, st.binary(max_size=50), st.binary(max_size=50))
def test_a_signature_says_one_thing_for_one_purpose_by_one_peer(
    seed: bytes, other_seed: bytes, domain: str, other_domain: str, message: bytes, other_message: bytes
) -> None:
    key, other = PeerKey(seed), PeerKey(other_seed)
    signature = key.sign(domain, message)
    for peer, purpose, text in [(other, domain, message), (key, other_domain, message), (key, domain, other_message)]:
        if (peer.id, purpose, text) != (key.id, domain, message):
            with pytest.raises(Invalid):
                verify_peer(peer.id, purpose, text, signature)


@given(SEEDS, SEEDS)
def test_the_signer_of_a_digest_is_recovered(secret: bytes, digest: bytes) -> None:
    try:
        key = AccountKey(secret)
    except Invalid:  # zero, or beyond the curve's order
        assume(False)
        raise
    assert recover_account(digest, key.sign_digest(digest)) == key.account


@given(SEEDS, st.integers(0, 519))
def test_a_flipped_bit_never_recovers_to_the_signer(digest: bytes, bit: int) -> None:
    key = AccountKey(b"\x07" * 32)
    signature = bytearray(key.sign_digest(digest))
    signature[bit // 8] ^= 1 << bit % 8
    try:
        recovered = recover_account(digest, bytes(signature))
    except Invalid:
        return
    assert recovered != key.account


# --- Merkle trees, ids


@given(st.lists(SEEDS, min_size=1, max_size=40))
def test_every_proof_folds_to_the_root(leaves: list[bytes]) -> None:
    tree = MerkleTree(leaves)
    for index, leaf in enumerate(leaves):
        proof = tree.proof(index)
        assert fold(leaf, proof) == tree.root
        assert len(proof) <= (len(leaves) - 1).bit_length()


@given(st.lists(SEEDS, min_size=1, max_size=40), st.data())
def test_a_leaf_that_is_not_in_the_tree_proves_nothing(leaves: list[bytes], data: st.DataObject) -> None:
    tree = MerkleTree(leaves)
    stranger = data.draw(SEEDS)
    assume(stranger not in leaves)
    for index in range(len(leaves)):
        assert fold(stranger, tree.proof(index)) != tree.root


@given(st.lists(SEEDS, min_size=2, max_size=20), st.data())
def test_changing_any_leaf_changes_the_root(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    other = data.draw(SEEDS)
    assume(other != leaves[index])
    changed = [*leaves[:index], other, *leaves[index + 1 :]]
    assume(sorted(changed) != sorted(leaves))  # pairs are sorted: swapping two neighbours is no change
    assert MerkleTree(changed).root != MerkleTree(leaves).root


@given(st.binary(min_size=20, max_size=20))
def test_the_checksummed_form_reads_back(address: bytes) -> None:
    account = account_from_bytes(address)
    assert parse_account(account) == account
    assert parse_account(account.lower()) == account
    assert bytes.fromhex(account[2:]) == address


# --- errors


@given(JSON_LIKE | st.fixed_dictionaries({"code": JSON_LIKE, "message": JSON_LIKE, "fields": JSON_LIKE}))
def test_reading_a_peers_error_never_raises(data: Any) -> None:
    assert isinstance(from_dict(data), TesseraError)


@given(
    st.sampled_from(["refused", "unavailable", "misbehaviour", "late"]),
    st.dictionaries(st.sampled_from(["self", "message", "rule", "retry_after_s", "evidence", "cls", "x"]), JSON_LIKE),
)
def test_fields_aimed_at_our_parameters_never_raise(code: str, fields: dict[str, Any]) -> None:
    assert from_dict({"code": code, "message": "m", "fields": fields}).code == code
