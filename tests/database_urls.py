"""`database_url`: a test that asks for it runs twice, on an empty SQLite file and on an empty PostgreSQL database.

One server of Debian's `postgresql` for each test process that needs one, in a temporary folder, on a Unix socket.
Without the package those tests are skipped; with CI=true they fail.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDERS = "/usr/lib/postgresql"
START_S = 30.0
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",  # nobody needs these tables after a power cut
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
    "deadlock_timeout": "50ms",
    "log_min_messages": "fatal",
}


def find_postgres() -> Path | None:
    """The folder of the newest server's programs."""
    found = sorted(Path(FOLDERS).glob("*/bin/postgres"), key=lambda file: int(file.parent.parent.name))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _missing(what: str) -> None:
    message = f"{what} is missing: apt-get install postgresql, pip install 'psycopg[binary]'"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a running server, as its superuser."""
    programs = find_postgres()
    if programs is None:
        _missing("PostgreSQL")
        return
    pytest.importorskip("psycopg")
    folder = Path(tempfile.mkdtemp(prefix="tessera-pg-"))  # short: a socket's path has at most 107 characters
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # the server refuses to run as root
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    data = folder / "data"
    make = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)
    settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
    command = [programs / "postgres", "-D", data, "-k", folder, *settings]
    server = subprocess.Popen(command, cwd=folder, **user)
    try:
        _wait(server, folder)
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: what it holds is not wanted
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(server: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_S
    pid_file = folder / "data" / "postmaster.pid"
    while not (pid_file.exists() and any("ready" in line for line in pid_file.read_text().splitlines()[-1:])):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"PostgreSQL did not start in {folder}: exit status {server.poll()}")
        time.sleep(0.02)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """An empty database: what a test makes in it is dropped afterwards, and connections that it left open are cut."""
    import psycopg

    yield postgres_server
    with psycopg.connect(postgres_server, autocommit=True) as admin:
        admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()")
        left = admin.execute("select nspname from pg_namespace where nspname !~ '^(pg_|information_schema|public)'")
        for (schema,) in left.fetchall():
            admin.execute(f'drop schema "{schema}" cascade')


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'tables.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))
