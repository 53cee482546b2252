"""What `tessera up` may be asked for, and what it refuses with a reason."""

from pathlib import Path
from typing import Any

import pytest

from tessera.core.errors import Invalid
from tessera.devnet.plan import UpConfig


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"own_workers": -1}, "-1 own workers"),
        ({"own_workers": 5}, "5 own workers for 4 seats"),
        ({"manifest": Path("/nowhere/run.json")}, "no manifest at /nowhere/run.json"),
        ({"manifest": Path(__file__), "data": Path(__file__)}, "either data or a manifest"),
        ({"relays": (("relay.example", ""),)}, "https://relay.example, not 'relay.example'"),
        ({"relays": (("https://relay.example", ""),) * 9}, "9 relays, at most 8"),
        ({"database": "secret"}, "a database is a URL"),
    ],
)
def test_what_cannot_be_run_is_refused(asked: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=reason):
        UpConfig(tmp_path, **asked)


def test_secrets_stay_out_of_what_is_printed(tmp_path: Path) -> None:
    config = UpConfig(
        tmp_path, database="postgresql://me:hunter2@db/x", relays=(("https://r.example", "token-7"),), own_workers=0
    )
    assert "hunter2" not in repr(config)
    assert "token-7" not in repr(config)
