"""`tessera gateway keys`: made, listed, revoked, beside a gateway that serves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import structlog
from typer.testing import CliRunner

from tessera.cli.logs import forget_logs
from tessera.cli.main import app
from tessera.core.clock import SystemClock
from tessera.devnet.tills import own_tables
from tessera.serving.paying.keys import ApiKey, KeyRing
from tessera.training.home import Home


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TESSERA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr("sys.argv", ["tessera"])
    yield
    forget_logs()
    structlog.reset_defaults()


def tessera(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["gateway", *words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    """Of a gateway in `tmp_path`."""
    where, schema = own_tables(Home(tmp_path))("keys")
    return KeyRing(SystemClock(), where=where, schema=schema)


def found(ring: KeyRing, secret: str) -> ApiKey | None:
    return anyio.run(ring.find, secret)


def test_a_key_is_shown_once_and_works_until_it_is_revoked(tmp_path: Path, ring: KeyRing) -> None:
    here = ("--state-dir", str(tmp_path))
    code, out, err = tessera("keys", "new", "laptop", "--tokens-per-day", "5000", *here)
    secret = out.strip()
    key = found(ring, secret)
    assert code == 0
    assert key is not None
    assert (key.owner, key.tokens_per_day, secret in err) == ("laptop", 5_000, False)
    code, out, _ = tessera("keys", "list", *here)
    assert code == 0
    assert key.id in out
    assert "5,000 tokens a day" in out
    assert secret not in out
    code, out, _ = tessera("keys", "revoke", key.id, *here)
    assert (code, found(ring, secret)) == (0, None)
    (listed,) = json.loads(tessera("keys", "list", "--json", *here)[1])
    assert (listed["id"], listed["revoked"] > 0) == (key.id, True)
    assert tessera("keys", "revoke", key.id, *here)[0] == 1
    ring.close()


def test_where_no_gateway_was_there_is_no_key(tmp_path: Path) -> None:
    Home(tmp_path)
    code, _, err = tessera("keys", "list", "--state-dir", str(tmp_path))
    assert code == 1
    assert "no gateway" in err


@pytest.mark.parametrize("words", [("new", ""), ("new", "x", "--tokens-per-day", "-1"), ("list", "--kind", "gold")])
def test_what_makes_no_sense_is_refused(tmp_path: Path, ring: KeyRing, words: tuple[str, ...]) -> None:
    assert tessera("keys", *words, "--state-dir", str(tmp_path))[0] == 2
    ring.close()
