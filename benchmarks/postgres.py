"""A PostgreSQL server of Debian's package in a temporary folder, for benchmarks that compare both databases."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDERS = "/usr/lib/postgresql"
START_S = 30.0


@contextmanager
def postgres_server(max_connections: int = 100) -> Iterator[str | None]:
    """Its URL, or None where PostgreSQL or its driver is not installed. Gone afterwards."""
    found = sorted(Path(FOLDERS).glob("*/bin/postgres"), key=lambda file: int(file.parent.parent.name))
    try:
        import psycopg  # noqa: F401
    except ImportError:
        found = []
    if not found:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="tessera-pg-"))  # short: a socket's path has at most 107 characters
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # the server refuses to run as root
        account = pwd.getpwnam("postgres")
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    programs, data = found[-1].parent, folder / "data"
    make = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)
    settings = [
        f"--max_connections={max_connections}",
        "--listen_addresses=",
        "--fsync=off",
        "--log_min_messages=fatal",
    ]
    server = subprocess.Popen([programs / "postgres", "-D", data, "-k", folder, *settings], cwd=folder, **user)
    try:
        _wait(server, data / "postmaster.pid")
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(server: subprocess.Popen[bytes], pid_file: Path) -> None:
    deadline = time.monotonic() + START_S
    while not (pid_file.exists() and any("ready" in line for line in pid_file.read_text().splitlines()[-1:])):
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"PostgreSQL did not start: exit status {server.poll()}")
        time.sleep(0.02)
