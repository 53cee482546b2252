"""The keys of a state directory: `peer.key`, `account.key`, and one `<name>.key` for each further account.

A file holds 64 hexadecimal digits, or the same secret sealed under a passphrase (`sealing`). Each file says which, so a
crash in the middle of protecting leaves keys that all still open, and protecting again finishes the work. Secrets are
files that only their owner may read; no secret is ever written elsewhere. When one key is protected, a new one is too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tessera.core.errors import Conflict, Invalid, Missing
from tessera.core.signing import AccountKey, PeerKey
from tessera.training.files import write_atomic
from tessera.training.passphrase import ask_passphrase
from tessera.training.sealing import SEALED_LIMIT, Kind, Sealed, SealingKey

__all__ = ["KeyEntry", "Keyring", "key_name", "read_secret"]

PEER = "peer"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class KeyEntry:
    """What may be shown of a key."""

    name: str
    kind: Kind
    address: str  # the peer's id or the account; of a protected key as its file says
    protected: bool


class Keyring:
    """The keys in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, bytes] = {}

    def ensure(self, name: str) -> None:
        """Make the key if it is missing. Raises `Invalid` for a damaged file."""
        file = self._file(name)
        if not file.exists():
            secret = PeerKey.generate().seed if _kind(name) == "peer" else AccountKey.generate().secret
            write_atomic(file, self._form(name, secret), mode=0o600, replace=False)  # a process beside us may be first
        self._read(name)

    def secret(self, name: str) -> bytes:
        """The 32 bytes; asks for the passphrase when the key is protected.

        Raises: Missing, Invalid for a damaged file, Refused for a wrong passphrase.
        """
        if name not in self._opened:
            content = self._read(name)
            if isinstance(content, Sealed):
                content = self._open(content, ask_passphrase(f"to open {content.name}"))
            self._opened[name] = content
        return self._opened[name]

    def entries(self) -> list[KeyEntry]:
        """All keys, the peer's and the worker's account first; nothing is opened."""
        first = (PEER, "account")
        names = sorted((file.stem for file in self._folder.glob("*.key")), key=lambda name: (name not in first, name))
        return [self._entry(name) for name in sorted(names, key=lambda name: name != PEER)]

    @property
    def protected(self) -> bool:
        return any(entry.protected for entry in self.entries())

    def protect(self, passphrase: str) -> list[str]:
        """Seal every key that lies open. Returns their names.

        Raises: Refused when another key is protected with another passphrase: one passphrase opens all.
        """
        key = self._sealing_key(passphrase) or SealingKey.from_passphrase(passphrase)
        done = []
        for entry in self.entries():
            if not entry.protected:
                secret = self.secret(entry.name)
                sealed = key.seal(secret, entry.kind, entry.address)
                if Sealed.parse(entry.name, sealed).open(passphrase) != secret:
                    raise Invalid(f"{entry.name}.key would not open again: it stays as it is")
                write_atomic(self._file(entry.name), sealed, mode=0o600)
                done.append(entry.name)
        return done

    def unprotect(self, passphrase: str) -> list[str]:
        """Write every protected key in the open. Returns their names. Raises `Refused` before it writes anything."""
        sealed = {entry.name: self._read(entry.name) for entry in self.entries() if entry.protected}
        secrets = {name: self._open(one, passphrase) for name, one in sealed.items() if isinstance(one, Sealed)}
        for name, secret in secrets.items():
            write_atomic(self._file(name), secret.hex().encode(), mode=0o600)
        return list(secrets)

    def add(self, name: str, secret: bytes, *, replace: bool = False) -> KeyEntry:
        """Keep a key that comes from elsewhere.

        Raises `Conflict` when there is one of that name; with `replace` that one stays too, as `<name>-old-<n>`.
        """
        file = self._file(name)
        if file.exists() and not replace:
            raise Conflict(f"{file} exists: nothing was changed; --replace keeps it under another name")
        content = self._form(name, secret)
        if file.exists():
            os.link(file, self._spare(name))
        write_atomic(file, content, mode=0o600)
        self._opened.pop(name, None)
        return self._entry(name)

    def address(self, name: str) -> str:
        """The peer's id or the account, proven by opening the key."""
        return _address(name, self.secret(name))

    # --- inside -----------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return self._folder / f"{key_name(name)}.key"

    def _spare(self, name: str) -> Path:
        return next(file for n in range(1, 1000) if not (file := self._file(f"{name}-old-{n}")).exists())

    def _form(self, name: str, secret: bytes) -> bytes:
        """The new file's content, sealed when the others are."""
        if not self.protected:
            _address(name, secret)
            return secret.hex().encode()
        passphrase = ask_passphrase(f"to protect {name}.key like the others")
        key = self._sealing_key(passphrase) or SealingKey.from_passphrase(passphrase)
        return key.seal(secret, _kind(name), _address(name, secret))

    def _sealing_key(self, passphrase: str) -> SealingKey | None:
        """Checks that `passphrase` opens what is protected; None when nothing is, or not by us."""
        found = None
        for entry in self.entries():
            content = self._read(entry.name)
            if isinstance(content, Sealed):
                self._open(content, passphrase)
                found = found or content.sealing_key(passphrase)
        return found

    def _read(self, name: str) -> bytes | Sealed:
        file = self._file(name)
        try:
            with file.open("rb") as opened:
                data = opened.read(SEALED_LIMIT + 1)
        except FileNotFoundError as error:
            raise Missing(f"there is no {file}: `tessera keys show` lists the keys") from error
        except OSError as error:
            raise Invalid(f"cannot read {file}: {error.strerror}") from error
        if data.lstrip()[:1] == b"{":
            sealed = Sealed.parse(str(file), data)
            if sealed.kind != _kind(name):
                raise Invalid(f"{file} holds a key of another kind: {sealed.kind}")
            return sealed
        try:
            secret = bytes.fromhex(data.decode().strip())
        except ValueError as error:
            raise Invalid(f"{file} is damaged: restore it from your backup") from error
        if len(secret) != 32:
            raise Invalid(f"{file} is damaged: it holds {len(secret)} bytes, expected 32; restore it from your backup")
        return secret

    def _open(self, sealed: Sealed, passphrase: str) -> bytes:
        secret = sealed.open(passphrase)
        if _address(Path(sealed.name).stem, secret) != sealed.address:
            raise Invalid(f"{sealed.name} was altered: the key in it is not {sealed.address}'s")
        return secret

    def _entry(self, name: str) -> KeyEntry:
        content = self._read(name)
        if isinstance(content, Sealed):
            return KeyEntry(name, content.kind, content.address, True)
        return KeyEntry(name, _kind(name), _address(name, content), False)


def read_secret(file: Path, passphrase: Callable[[], str]) -> bytes:
    """The 32 bytes in a file from elsewhere: a keystore, or 64 hexadecimal digits. Raises `Invalid`, `Refused`."""
    try:
        with file.open("rb") as opened:
            data = opened.read(SEALED_LIMIT + 1)
    except OSError as error:
        raise Invalid(f"cannot read {file}: {error.strerror}") from error
    if data.lstrip()[:1] == b"{":
        return Sealed.parse(str(file), data).open(passphrase())
    try:
        return bytes.fromhex(data.decode().strip().removeprefix("0x"))
    except ValueError as error:
        raise Invalid(f"{file} is neither a keystore (Web3, version 3) nor 64 hexadecimal digits") from error


def key_name(name: str) -> str:
    """Raises `Invalid` for what cannot name a key."""
    if _NAME.fullmatch(name) is None:
        raise Invalid(f"a key's name has up to 40 of a-z, 0-9 and inner hyphens, not {name[:60]!r}")
    return name


def _kind(name: str) -> Kind:
    return "peer" if name == PEER or name.startswith(f"{PEER}-") else "account"


def _address(name: str, secret: bytes) -> str:
    """Who the secret is. Raises `Invalid` for one that is none."""
    return PeerKey(secret).id if _kind(name) == "peer" else AccountKey(secret).account
