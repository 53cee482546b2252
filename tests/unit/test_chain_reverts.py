"""A revert's bytes as text: strings, panics, and the custom errors of Permit2 and x402's proxies."""

from __future__ import annotations

import pytest
from eth_abi.abi import encode

from tessera.chain.reverts import ERRORS, revert_error, revert_reason
from tessera.core.errors import Conflict, Invalid, Refused, TesseraError
from tessera.core.hashing import keccak


def selector(signature: str) -> bytes:
    return keccak(signature.encode())[:4]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no reason given"),
        (selector("Error(string)") + encode(["string"], ["coin: bad receiver"]), "coin: bad receiver"),
        (selector("Panic(uint256)") + encode(["uint256"], [0x11]), "panic 0x11: arithmetic overflow"),
        (selector("Panic(uint256)") + encode(["uint256"], [0x99]), "panic 0x99"),
        (selector("InvalidNonce()"), "InvalidNonce()"),
        (selector("SignatureExpired(uint256)") + encode(["uint256"], [17]), "SignatureExpired(17)"),
        (selector("SignatureExpired(uint256)") + b"\x01", "SignatureExpired(0x01)"),
        (selector("SomebodyElses(uint256)"), "0x" + selector("SomebodyElses(uint256)").hex()),
        (selector("Error(string)") + b"\xff" * 64, "0x08c379a0" + "ff" * 64),
    ],
)
def test_every_kind_of_reason_is_read(data: bytes, text: str) -> None:
    assert revert_reason(data) == text


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("InvalidNonce()", Conflict),
        ("SignatureExpired(17)", Invalid),
        ("UnauthorizedFacilitator()", Refused),
        ("SomebodyElses()", Refused),
    ],
)
def test_a_custom_error_says_what_to_do(reason: str, error: type[TesseraError]) -> None:
    assert type(revert_error(reason)) is error


def test_no_two_custom_errors_share_a_selector() -> None:
    assert len({selector(signature) for signature in ERRORS}) == len(ERRORS)
