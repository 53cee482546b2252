"""What every test shares.

- anyio runs on asyncio, the only backend that the p2p engine supports.
- Hypothesis draws the same examples every time, and has no deadline: pytest's own is enough.
- `golden` compares a value with a recorded file; `make golden` rewrites the files.
- `database_url` is an empty database, of each kind in turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import settings

from database_urls import database_url, postgres_server, postgres_url  # noqa: F401
from fuzzing import FUZZ

settings.register_profile("tessera", derandomize=FUZZ == 1, deadline=None, database=None, print_blob=FUZZ > 1)
settings.load_profile("tessera")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the recorded files instead of comparing")


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """A command that a test ran in this process must not mute the next test's events."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """`golden("specs/vectors/merkle.json", value)`: `value` is what that file, relative to the repository, records."""

    def compare(path: str, value: Any) -> None:
        file = ROOT / path
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            return
        assert file.exists(), f"{path} is not recorded yet: run `make golden`"
        assert file.read_text(encoding="utf-8") == text, (  # as text: in Python, 1 == 1.0 == True
            f"{path} differs. If the change is meant, run `make golden` and commit the file."
        )

    return compare
