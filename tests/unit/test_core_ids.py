"""Ids: checked strings, and the EIP-55 checksum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tessera.core import ids
from tessera.core.errors import Invalid

EIP_55 = [  # the vectors in the EIP
    "0x52908400098527886E0F7030069857D2E4169EE7",
    "0x8617E340B3D01FA5F11F306F4090FD50E238070D",
    "0xde709f2102306220921060314715629080e2fb77",
    "0x27b1fdb04752bbc536007a920d24acb045561c26",
    "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
    "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
    "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
    "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
]


@pytest.mark.parametrize("account", EIP_55)
def test_the_eips_own_vectors_hold(account: str) -> None:
    assert ids.parse_account(account) == account
    assert ids.parse_account(account.lower()) == account
    assert ids.parse_account("0x" + account[2:].upper()) == account


@pytest.mark.parametrize("account", EIP_55[4:])
def test_one_wrong_letter_breaks_the_checksum(account: str) -> None:
    at = next(i for i in range(2, 42) if account[i].isalpha())
    with pytest.raises(Invalid, match="wrong checksum"):
        ids.parse_account(account[:at] + account[at].swapcase() + account[at + 1 :])


@pytest.mark.parametrize(
    "text", [None, 7, b"0x", "", "0x", "52908400098527886E0F7030069857D2E4169EE7", EIP_55[0] + "0", EIP_55[0] + "\n",
             EIP_55[0][:-1] + "g", "0X" + EIP_55[0][2:]]
)  # fmt: skip
def test_what_is_no_account_is_refused(text: Any) -> None:
    with pytest.raises(Invalid, match="an account is 0x and 40 hex digits"):
        ids.parse_account(text)


def test_an_address_has_twenty_bytes() -> None:
    assert ids.account_from_bytes(bytes.fromhex(EIP_55[4][2:])) == EIP_55[4]
    with pytest.raises(Invalid, match="20 bytes, not 19"):
        ids.account_from_bytes(bytes(19))


@pytest.mark.parametrize("parse", [ids.parse_peer_id, ids.parse_run_id, ids.parse_blob_id])
@pytest.mark.parametrize("text", [None, 7, "", "ab" * 31, "ab" * 33, "AB" * 32, "zz" * 32, "ab" * 32 + "\n"])
def test_an_id_is_64_lower_case_hex_digits(parse: Callable[[object], str], text: object) -> None:
    assert parse("ab" * 32) == "ab" * 32
    with pytest.raises(Invalid, match="64 lower-case hex digits"):
        parse(text)
