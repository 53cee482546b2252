"""Keys at rest: open or sealed, alone or together, and never lost."""

import json
import os
from pathlib import Path

import pytest
from eth_account import Account as EthAccount

from tessera.core.errors import Conflict, Invalid, Missing, Refused
from tessera.core.signing import AccountKey, PeerKey
from tessera.training import keystore, sealing
from tessera.training.home import Home
from tessera.training.keystore import Keyring
from tessera.training.passphrase import use_passphrases
from tessera.training.sealing import Sealed, SealingKey

PASSPHRASE, WRONG = "correct horse battery", "incorrect horse"


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SCRYPT_N", 1 << 10)  # what it costs is not what is tested here
    use_passphrases(None)


def _said(passphrase: str) -> list[str]:
    asked: list[str] = []

    def source(purpose: str, /) -> str:
        asked.append(purpose)
        return passphrase

    use_passphrases(source)
    return asked


def test_protected_keys_are_the_same_keys(tmp_path: Path) -> None:
    before = Home(tmp_path)
    buyer = before.account("buyer")
    assert before.keys.protect(PASSPHRASE) == ["peer", "account", "buyer"]
    for file in tmp_path.glob("*.key"):
        assert file.stat().st_mode & 0o077 == 0
        for secret in (before.peer_key.seed, before.account_key.secret, buyer.secret):
            assert secret.hex() not in file.read_text()
    asked = _said(PASSPHRASE)
    after = Home.existing(tmp_path)
    assert asked == []  # opening the directory asks nothing: a command that only looks needs no key
    assert (after.peer_key, after.account_key, after.account("buyer")) == (before.peer_key, before.account_key, buyer)
    assert after.keys.unprotect(PASSPHRASE) == ["peer", "account", "buyer"]
    use_passphrases(None)
    assert Home(tmp_path).peer_key == before.peer_key


def test_a_protected_key_needs_somebody_to_ask(tmp_path: Path) -> None:
    Home(tmp_path).keys.protect(PASSPHRASE)
    with pytest.raises(Missing, match=r"to open .*peer\.key"):
        _ = Home(tmp_path).peer_key


def test_a_wrong_passphrase_changes_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.keys.protect(PASSPHRASE)
    files = {file.name: file.read_bytes() for file in tmp_path.glob("*.key")}
    with pytest.raises(Refused, match="does not open") as refusal:
        Keyring(tmp_path).unprotect(WRONG)
    assert refusal.value.rule == "passphrase"
    with pytest.raises(Refused):
        Keyring(tmp_path).protect(WRONG)  # one passphrase opens all
    _said(WRONG)
    with pytest.raises(Refused):
        Home(tmp_path).account("new")  # a new key would be sealed with another passphrase
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.key")} == files


def test_a_crash_while_keys_are_protected_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    keys = (home.peer_key, home.account_key, home.account("buyer"))
    written = []

    def crash(file: Path, data: bytes, **options: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(file)
        real(file, data, **options)  # type: ignore[arg-type]

    real = keystore.write_atomic
    with monkeypatch.context() as patched:
        patched.setattr(keystore, "write_atomic", crash)
        with pytest.raises(KeyboardInterrupt):
            Keyring(tmp_path).protect(PASSPHRASE)
    assert [entry.protected for entry in Keyring(tmp_path).entries()] == [True, False, False]
    _said(PASSPHRASE)
    half = Home(tmp_path)
    assert (half.peer_key, half.account_key, half.account("buyer")) == keys
    assert Keyring(tmp_path).protect(PASSPHRASE) == ["account", "buyer"]  # finishes the work
    assert all(entry.protected for entry in Keyring(tmp_path).entries())


def test_keys_that_come_later_are_protected_too(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.keys.protect(PASSPHRASE)
    asked = _said(PASSPHRASE)
    account = Home(tmp_path).account("creator").account
    assert len(asked) == 2  # to seal, then to open
    (entry,) = [entry for entry in home.keys.entries() if entry.name == "creator"]
    assert (entry.protected, entry.address, entry.kind) == (True, account, "account")


def test_addresses_are_shown_without_opening_anything(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.keys.protect(PASSPHRASE)
    shown = {entry.name: entry.address for entry in Keyring(tmp_path).entries()}
    assert shown == {"peer": home.peer_key.id, "account": home.account_key.account}


def test_wallets_open_a_protected_account(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.keys.protect(PASSPHRASE)
    assert EthAccount.decrypt((tmp_path / "account.key").read_text(), PASSPHRASE) == home.account_key.secret


@pytest.mark.parametrize(("kdf", "rounds"), [("scrypt", 1 << 10), ("pbkdf2", 1000)])
def test_a_wallets_file_serves_as_a_key(kdf: str, rounds: int, tmp_path: Path) -> None:
    key = AccountKey.generate()
    wallet = EthAccount.encrypt(key.secret, PASSPHRASE, kdf=kdf, iterations=rounds)  # type: ignore[arg-type]
    sealed = Sealed.parse("wallet.json", json.dumps(wallet).encode())
    assert (sealed.open(PASSPHRASE), sealed.address) == (key.secret, key.account)
    with pytest.raises(Refused):
        sealed.open(WRONG)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["crypto"]["kdfparams"].update(n=1 << 40),
        lambda value: value["crypto"]["kdfparams"].update(p=1 << 20),
        lambda value: value["crypto"]["kdfparams"].update(r=-1),
        lambda value: value["crypto"].update(kdf="argon2"),
        lambda value: value["crypto"].update(ciphertext="00" * 64),
        lambda value: value["crypto"]["cipherparams"].update(iv="00"),
        lambda value: value.update(version=4),
        lambda value: value.update(tessera=[]),
        lambda value: value.update(tessera={"peer": "x"}),
        lambda value: value.update(address=7),
        lambda value: value.pop("crypto"),
    ],
)
def test_a_bent_keystore_is_named_and_never_computed(change: object, tmp_path: Path) -> None:
    key = AccountKey.generate()
    value = json.loads(SealingKey.from_passphrase(PASSPHRASE).seal(key.secret, "account", key.account))
    change(value)  # type: ignore[operator]
    (tmp_path / "account.key").write_text(json.dumps(value))
    with pytest.raises(Invalid, match=r"account\.key"):
        Keyring(tmp_path).secret("account")


def test_a_key_under_another_address_is_altered(tmp_path: Path) -> None:
    mine, theirs = AccountKey.generate(), AccountKey.generate()
    sealed = SealingKey.from_passphrase(PASSPHRASE).seal(mine.secret, "account", theirs.account)
    (tmp_path / "account.key").write_bytes(sealed)
    _said(PASSPHRASE)
    with pytest.raises(Invalid, match="was altered"):
        Keyring(tmp_path).secret("account")


def test_a_peers_key_is_no_account(tmp_path: Path) -> None:
    peer = PeerKey.generate()
    (tmp_path / "account.key").write_bytes(SealingKey.from_passphrase(PASSPHRASE).seal(peer.seed, "peer", peer.id))
    with pytest.raises(Invalid, match="another kind"):
        Keyring(tmp_path).ensure("account")


def test_a_key_from_elsewhere_replaces_nothing_unasked(tmp_path: Path) -> None:
    ring, key = Home(tmp_path).keys, AccountKey.generate()
    with pytest.raises(Conflict, match="nothing was changed"):
        ring.add("account", key.secret)
    assert ring.add("account", key.secret, replace=True).address == key.account
    assert Home(tmp_path).account_key == key
    for name in ("../evil", "", "A", "-x", "peer/"):
        with pytest.raises(Invalid, match="a key's name"):
            ring.add(name, key.secret)
    with pytest.raises(Invalid):
        ring.add("zero", bytes(32))
    assert not (tmp_path / "zero.key").exists()


def test_one_scrypt_opens_all_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    for name in ("buyer", "creator"):
        home.account(name)
    home.keys.protect(PASSPHRASE)
    sealing._derive.cache_clear()
    computed = []
    real = sealing._scrypt
    monkeypatch.setattr(sealing, "_scrypt", lambda *args: computed.append(1) or real(*args))
    _said(PASSPHRASE)
    again = Home(tmp_path)
    assert again.account("buyer") != again.account("creator") != again.account_key
    _ = again.peer_key
    assert len(computed) == 1


def test_an_unreadable_key_is_named(tmp_path: Path) -> None:
    Home(tmp_path)
    os.remove(tmp_path / "peer.key")
    (tmp_path / "peer.key").mkdir()
    with pytest.raises(Invalid, match=r"cannot read .*peer\.key"):
        Home(tmp_path)
