"""What we write as recursive length prefix is what the library writes, and reads back."""

import rlp
from hypothesis import given
from hypothesis import strategies as st

from tessera.chain.rlp_forms import rlp_bytes, rlp_encode, rlp_list

STRINGS = st.binary(max_size=80) | st.integers(0, 2**17).map(lambda size: b"\x7f" * (size % 70_000))
ITEMS = st.recursive(STRINGS, lambda inner: st.lists(inner, max_size=5), max_leaves=20)


@given(ITEMS)
def test_bytes_and_lists_are_written_as_the_library_writes_them(item: bytes | list[object]) -> None:
    assert rlp_encode(item) == rlp.encode(item)


@given(st.integers(0, 2**256 - 1))
def test_so_are_numbers(number: int) -> None:
    assert rlp_encode(number) == rlp.encode(number)


@given(st.lists(STRINGS, max_size=5))
def test_a_list_of_encoded_items_is_the_list_of_the_items(items: list[bytes]) -> None:
    assert rlp_list(b"".join(map(rlp_bytes, items))) == rlp.encode(items)
