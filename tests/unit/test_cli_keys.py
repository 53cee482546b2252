"""`tessera keys`, as typed; and where its passphrase comes from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from eth_account import Account as EthAccount
from typer.testing import CliRunner

from tessera.cli.logs import forget_logs
from tessera.cli.main import app
from tessera.core.signing import AccountKey
from tessera.training import backup_stream, sealing
from tessera.training.home import Home
from tessera.training.passphrase import use_passphrases

PASSPHRASE = "correct horse battery"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sealing, "SCRYPT_N", 1 << 10)
    monkeypatch.setenv("TESSERA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("TESSERA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("sys.argv", ["tessera"])
    yield
    forget_logs()
    structlog.reset_defaults()
    use_passphrases(None)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "passphrase"
    file.write_text(PASSPHRASE + "\n")
    file.chmod(0o600)
    monkeypatch.setenv("TESSERA_PASSPHRASE_FILE", str(file))
    return file


def keys(*words: object, **options: Any) -> Any:
    return CliRunner().invoke(app, ["keys", *map(str, words)], catch_exceptions=False, **options)


def test_addresses_are_shown_and_secrets_only_when_asked_for(state: Path, tmp_path: Path) -> None:
    home = Home(state)
    secrets = [home.account_key.secret.hex(), home.peer_key.seed.hex()]
    shown = keys("show", "--json")
    assert [key["address"] for key in json.loads(shown.stdout)["keys"]] == [home.peer_key.id, home.account_key.account]
    refused = keys("export", "account", tmp_path / "out", "--plain", input="n\n")
    assert refused.exit_code == 1
    assert not (tmp_path / "out").exists()
    assert not any(secret in output.output for output in (shown, refused) for secret in secrets)
    told = keys("export", "account", "-", "--plain", "--yes")
    assert told.stdout.strip() == secrets[0]
    assert "Whoever has this secret is you" in told.stderr


def test_keys_are_protected_and_opened_again(state: Path, passphrase: Path) -> None:
    key = Home(state).account_key
    assert "Protected: peer, account" in keys("protect").output
    assert "protected already" in keys("protect").output
    assert all(entry["protected"] for entry in json.loads(keys("show", "--json").stdout)["keys"])
    passphrase.write_text("another one")
    wrong = keys("unprotect")
    assert wrong.exit_code == 1
    assert "does not open" in wrong.output
    assert "nothing was changed" in wrong.output
    passphrase.write_text(PASSPHRASE)
    assert "Open: peer, account" in keys("unprotect").output
    assert Home(state).account_key == key


def test_a_service_gets_its_passphrase_from_systemd(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Home(state)
    (tmp_path / "tessera-passphrase").write_text(PASSPHRASE)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert keys("protect").exit_code == 0
    assert keys("unprotect").exit_code == 0


def test_without_anybody_to_ask_it_says_what_to_do(state: Path) -> None:
    Home(state)
    result = keys("protect")
    assert result.exit_code == 1
    assert "TESSERA_PASSPHRASE_FILE" in result.output


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (b"short\n", 0o600, "at least 8 characters"),
        (PASSPHRASE.encode(), 0o644, "others may read the passphrase"),
        (b"two lines\nof text\n", 0o600, "one line"),
        (b"", 0o600, "one line"),
        (b"\xff" * 20, 0o600, "not text"),
        (b"x" * 5000, 0o600, "at most 4096 bytes"),
    ],
)
def test_a_bad_passphrase_file_is_refused(
    content: bytes, mode: int, message: str, state: Path, passphrase: Path
) -> None:
    Home(state)
    passphrase.write_bytes(content)
    passphrase.chmod(mode)
    result = keys("protect")
    assert result.exit_code == 2
    assert message in result.output
    assert not Home(state).keys.protected


def test_an_account_goes_to_a_wallet_and_comes_back(state: Path, tmp_path: Path, passphrase: Path) -> None:
    Home(state)
    address = keys("new", "savings").stdout.strip()
    assert keys("export", "savings", tmp_path / "savings.json").exit_code == 0
    secret = EthAccount.decrypt((tmp_path / "savings.json").read_text(), PASSPHRASE)
    assert AccountKey(bytes(secret)).account == address
    again = keys("export", "savings", tmp_path / "savings.json")
    assert "exists: nothing was written" in again.output

    other = tmp_path / "other"
    assert keys("import", "savings", tmp_path / "savings.json", "--state-dir", other).stdout.strip() == (
        f"savings: {address}"
    )
    mine = Home(other).account_key
    assert "exists: nothing was changed" in keys("import", "account", tmp_path / "savings.json").output
    assert keys("import", "account", tmp_path / "savings.json", "--replace", "--state-dir", other).exit_code == 0
    assert Home(other).account_key.account == address
    assert Home(other).account("account-old-1") == mine  # nothing is lost


def test_a_file_that_is_no_key_is_refused(state: Path, tmp_path: Path, passphrase: Path) -> None:
    Home(state)
    for content in ("{}", "zz", "00" * 32, "11" * 31):
        (tmp_path / "wallet").write_text(content)
        result = keys("import", "mine", tmp_path / "wallet")
        assert result.exit_code == 2, content
        assert not (state / "mine.key").exists()
    assert keys("new", "peer-2").exit_code == 2


def test_backup_and_restore_as_typed(state: Path, tmp_path: Path, passphrase: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(backup_stream, "SCRYPT_N", 1 << 10)
    peer = Home(state).peer_key.id
    run = CliRunner()
    taken = run.invoke(app, ["backup", str(tmp_path / "b"), "--json"], catch_exceptions=False)
    assert json.loads(taken.stdout) | {"files": 0, "bytes": 0} == {
        "file": str(tmp_path / "b"), "files": 0, "bytes": 0, "peer": peer, "encrypted": True,
    }  # fmt: skip
    back = run.invoke(app, ["restore", str(tmp_path / "b"), "--state-dir", str(tmp_path / "new")])
    assert back.exit_code == 0, back.output
    assert "Never run one identity on two machines" in back.stderr
    assert Home(tmp_path / "new").peer_key.id == peer
    again = run.invoke(app, ["restore", str(tmp_path / "b"), "--state-dir", str(tmp_path / "new")])
    assert (again.exit_code, "is not empty" in again.stderr) == (1, True)
    open_ = run.invoke(app, ["backup", str(tmp_path / "c"), "--plain"])
    assert "Not encrypted" in open_.stderr
