"""A secret of 32 bytes under a passphrase, in Ethereum's keystore format (Web3 Secret Storage, version 3).

scrypt makes 32 bytes from the passphrase: the first 16 encrypt with AES-128-CTR, the rest authenticate the ciphertext.
Wallets read the files of accounts. A peer's ed25519 seed lies in the same container, with `tessera.peer` in place of
`address`, so that no wallet takes it for an account.

Keys that are sealed together share one salt, so that one scrypt opens them all: each has its own random IV, which is
all that CTR needs. Cost: one scrypt is 0.3 s and 128 MiB.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import uuid
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from tessera.core.errors import Invalid, Refused
from tessera.core.hashing import keccak
from tessera.core.ids import parse_account, parse_peer_id

__all__ = ["SEALED_LIMIT", "Sealed", "SealingKey"]

SEALED_LIMIT = 16 * 1024  # bytes of one file
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 17, 8, 1
MEMORY_LIMIT = 1 << 29  # bytes that a file may make us use
ROUNDS_LIMIT = 10_000_000  # of PBKDF2
MAX_P = 16

Kind = Literal["account", "peer"]


@dataclass(frozen=True)
class SealingKey:
    """What a passphrase becomes with one salt: seals any number of secrets."""

    salt: bytes
    derived: bytes = field(repr=False)

    @classmethod
    def from_passphrase(cls, passphrase: str) -> SealingKey:
        """With a fresh salt. Raises `Invalid` for an empty passphrase."""
        if not passphrase:
            raise Invalid("an empty passphrase protects nothing")
        salt = secrets.token_bytes(32)
        return cls(salt, _scrypt(passphrase, salt, SCRYPT_N, SCRYPT_R, SCRYPT_P))

    def seal(self, secret: bytes, kind: Kind, address: str) -> bytes:
        """The file that holds `secret`; `address` stays readable."""
        iv = secrets.token_bytes(16)
        ciphertext = _aes_ctr(self.derived[:16], iv, secret)
        public = {"address": address[2:].lower()} if kind == "account" else {"tessera": {"peer": address}}
        scrypt = {"dklen": 32, "n": SCRYPT_N, "r": SCRYPT_R, "p": SCRYPT_P, "salt": self.salt.hex()}
        crypto = {
            "cipher": "aes-128-ctr",
            "cipherparams": {"iv": iv.hex()},
            "ciphertext": ciphertext.hex(),
            "kdf": "scrypt",
            "kdfparams": scrypt,
            "mac": keccak(self.derived[16:32] + ciphertext).hex(),
        }
        value = {**public, "crypto": crypto, "id": str(uuid.uuid4()), "version": 3}
        return json.dumps(value, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class Sealed:
    """A file read and checked, not opened."""

    name: str  # for messages
    kind: Kind
    address: str  # as written, proven only by opening; "" when the file names none
    _salt: bytes
    _kdf: tuple[Any, ...]
    _iv: bytes
    _ciphertext: bytes
    _mac: bytes

    @classmethod
    def parse(cls, name: str, data: bytes) -> Sealed:
        """Raises `Invalid` for anything but a version 3 keystore of 32 bytes within our limits."""
        try:
            value = json.loads(data[:SEALED_LIMIT])
            crypto = value["crypto"]
            peer = value.get("tessera", {}).get("peer")
            address = _parse_address(value.get("address")) if peer is None else parse_peer_id(peer)
            kdf, salt = _parse_kdf(crypto["kdf"], crypto["kdfparams"])
            parts = [bytes.fromhex(crypto["cipherparams"]["iv"]), bytes.fromhex(crypto["ciphertext"])]
            mac = bytes.fromhex(crypto["mac"])
            fits = (value["version"], crypto["cipher"]) == (3, "aes-128-ctr") and [*map(len, parts)] == [16, 32]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, Invalid) as error:
            raise Invalid(f"{name} is no keystore (Web3 Secret Storage, version 3), or damaged") from error
        if not fits:
            raise Invalid(f"{name} is a keystore of another kind: version 3 with aes-128-ctr and 32 bytes is expected")
        return cls(name, "account" if peer is None else "peer", address, salt, kdf, parts[0], parts[1], mac)

    def open(self, passphrase: str) -> bytes:
        """The secret. Raises `Refused` when the passphrase is another one."""
        derived = _derive(self._kdf, passphrase, self._salt)
        if not hmac.compare_digest(keccak(derived[16:32] + self._ciphertext), self._mac):
            raise Refused(
                f"this passphrase does not open {self.name}; nothing was changed, try again", rule="passphrase"
            )
        return _aes_ctr(derived[:16], self._iv, self._ciphertext)

    def sealing_key(self, passphrase: str) -> SealingKey | None:
        """The key that sealed this file, for further secrets; None when it was made by other means than ours."""
        if self._kdf != ("scrypt", SCRYPT_N, SCRYPT_R, SCRYPT_P):
            return None
        self.open(passphrase)
        return SealingKey(self._salt, _derive(self._kdf, passphrase, self._salt))


def _parse_address(text: object) -> str:
    """Wallets write it with or without 0x, in any case; some leave it out."""
    return "" if not text else parse_account("0x" + str(text).removeprefix("0x").lower())


def _parse_kdf(name: str, params: dict[str, Any]) -> tuple[tuple[Any, ...], bytes]:
    salt = bytes.fromhex(params["salt"])
    if params["dklen"] != 32 or len(salt) > 1024:
        raise ValueError("32 derived bytes are expected")
    if name == "scrypt":
        n, r, p = (int(params[key]) for key in ("n", "r", "p"))
        if not (n > 1 and r > 0 and 128 * n * r <= MEMORY_LIMIT and 0 < p <= MAX_P):
            raise ValueError("scrypt out of range")
        return ("scrypt", n, r, p), salt
    if name == "pbkdf2" and params["prf"] == "hmac-sha256" and 0 < int(params["c"]) <= ROUNDS_LIMIT:
        return ("pbkdf2", int(params["c"])), salt
    raise ValueError(name)


@lru_cache(maxsize=8)  # the keys of a state directory share one salt: opening all of them costs one scrypt
def _derive(kdf: tuple[Any, ...], passphrase: str, salt: bytes) -> bytes:
    if kdf[0] == "scrypt":
        return _scrypt(passphrase, salt, *kdf[1:])
    return hashlib.pbkdf2_hmac("sha256", passphrase.encode(), salt, kdf[1], 32)


def _scrypt(passphrase: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    try:
        return hashlib.scrypt(passphrase.encode(), salt=salt, n=n, r=r, p=p, dklen=32, maxmem=2 * MEMORY_LIMIT)
    except ValueError as error:  # OpenSSL's own limits
        raise Invalid(f"scrypt with n={n}, r={r}, p={p} cannot be computed here: {error}") from error


def _aes_ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    from Crypto.Cipher import AES

    return AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=iv).encrypt(data)
