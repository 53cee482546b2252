"""Database URLs: which ones are known, and that no secret in them is ever shown."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table

from tessera.core.errors import Invalid, Unavailable
from tessera.storage.database import open_database
from tessera.storage.layout import Layout
from tessera.storage.location import locate, schema_name

TABLES = MetaData()
Table("things", TABLES, Column("id", Integer, primary_key=True))
LAYOUT = Layout("things", TABLES)
SECRET = "s3cr3t"


def test_a_file_may_be_written_in_three_ways(tmp_path: Path) -> None:
    file = tmp_path / "a.sqlite"
    for where in (file, str(file), f"sqlite:///{file}"):
        assert locate(where).shown == str(file)
        assert locate(where, "run_1").shown == str(tmp_path / "a.run_1.sqlite")


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_server_is_shown_without_its_secrets(scheme: str) -> None:
    location = locate(f"{scheme}://me:{SECRET}@host:5433/shared?sslpassword={SECRET}", "run_1")
    assert location.shown == "postgresql://me:***@host:5433/shared (schema run_1)"
    assert location.hide(f"password {SECRET} is wrong") == "password *** is wrong"
    assert SECRET not in repr(location)


@pytest.mark.parametrize(
    "where",
    [
        f"mysql://me:{SECRET}@host/name",
        f"postgresql+asyncpg://me:{SECRET}@host/name",
        f"postgresql://me:{SECRET}@host:{SECRET}/name",
        f"://{SECRET}",
    ],
)
def test_another_url_is_refused_without_repeating_it(where: str) -> None:
    with pytest.raises(Invalid, match="expected") as caught:
        locate(where)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize("schema", ["Run", "1a", "a-b", 'a"; drop schema x', "a" * 64, "../up"])
def test_a_schema_is_a_plain_name(schema: str) -> None:
    with pytest.raises(Invalid, match="a schema is"):
        locate("tables.sqlite", schema)


def test_a_name_space_for_a_runs_worker_is_a_plain_name() -> None:
    assert schema_name("run", "7c" * 32, "0x" + "5B" * 20) == "run_7c7c7c7c7c7c7c7c_5b5b5b5b5b5b5b5b"
    assert locate("postgresql://host/name", schema_name("run", "7c" * 32)).schema == "run_7c7c7c7c7c7c7c7c"


def test_a_server_that_is_not_there_is_unavailable_and_shows_no_password(tmp_path: Path) -> None:
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is missing")
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        open_database(f"postgresql://me:{SECRET}@/name?host={tmp_path}", LAYOUT)
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__


def test_a_database_or_user_that_the_server_does_not_have_is_named(postgres_url: str) -> None:
    for wrong, told in (
        (postgres_url.replace("/postgres?", "/nothing?"), r'database "nothing" does not exist; correct the URL'),
        (postgres_url.replace("postgres@", f"nobody:{SECRET}@"), 'role "nobody" does not exist; correct the URL'),
        (f"{postgres_url}&nonsense={SECRET}", "invalid connection option"),
    ):
        with pytest.raises(Invalid, match=told) as caught:
            open_database(wrong, LAYOUT)
        assert SECRET not in str(caught.value)


def test_without_its_driver_postgresql_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(Invalid, match=r"pip install 'tessera-network\[postgres\]'"):
        open_database("postgresql://host/name", LAYOUT)
