"""A state directory: the two keys, the blobs, and one folder for each run. One process at a time works in it.

Layout:  version  lock  peer.key  account.key  blobs/  runs/<run id>/
Secrets are files that only their owner may read. Every file is written beside itself and renamed, so a crash leaves
the old one or the new one.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tessera.core.errors import Conflict, Invalid, Missing
from tessera.core.ids import RunId
from tessera.core.signing import AccountKey, PeerKey

__all__ = ["Home", "write_atomic"]

STATE_VERSION = "1"


class Home:
    """The state directory at `path`, created when missing.

    Raises: Invalid when the folder holds something else or a damaged state; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            entries = {entry.name for entry in path.iterdir()}
        except (OSError, ValueError) as error:
            raise Invalid(f"cannot use {path} as a state directory: {error}") from error
        self._check_version(entries)
        self.peer_key = PeerKey(self._secret("peer.key", PeerKey.generate().seed))
        self.account_key = AccountKey(self._secret("account.key", AccountKey.generate().secret))

    @classmethod
    def existing(cls, path: Path) -> Home:
        """As the constructor, but raises `Missing` rather than create a new identity."""
        if not (path / "version").exists():
            raise Missing(f"no Tessera state in {path}: give the --state-dir that you joined or started with")
        return cls(path)

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    def account(self, name: str) -> AccountKey:
        """A further account of this directory's owner, in `<name>.key`; created at first use."""
        return AccountKey(self._secret(f"{name}.key", AccountKey.generate().secret))

    def run_folder(self, run_id: RunId) -> Path:
        folder = self.path / "runs" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def runs(self) -> list[RunId]:
        """The runs that this directory knows, newest last."""
        folders = sorted((self.path / "runs").glob("*"), key=lambda folder: folder.stat().st_mtime)
        return [RunId(folder.name) for folder in folders if folder.is_dir()]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process. Raises `Conflict` when another process holds it."""
        with (self.path / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read(32).strip() or "unknown"
                raise Conflict(
                    f"{self.path} is in use by process {holder}: stop it, or give another --state-dir"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _check_version(self, entries: set[str]) -> None:
        file = self.path / "version"
        if "version" not in entries:
            foreign = sorted(name for name in entries if not name.startswith("."))
            if foreign:
                raise Invalid(f"{self.path} is not a Tessera state directory: it holds {', '.join(foreign[:5])}")
            write_atomic(file, STATE_VERSION.encode())
            return
        found = file.read_bytes()[:32].decode(errors="replace").strip()
        if found != STATE_VERSION:
            raise Invalid(f"{file} says version {found!r}, this Tessera reads version {STATE_VERSION!r}")

    def _secret(self, name: str, fresh: bytes) -> bytes:
        file = self.path / name
        if not file.exists():
            write_atomic(file, fresh.hex().encode(), mode=0o600, replace=False)  # a process beside us may be first
        try:
            secret = bytes.fromhex(file.read_text().strip())
        except (ValueError, OSError) as error:
            raise Invalid(f"{file} is damaged: restore it from your backup") from error
        if len(secret) != 32:
            raise Invalid(f"{file} is damaged: it holds {len(secret)} bytes, expected 32; restore it from your backup")
        return secret


def write_atomic(file: Path, data: bytes, *, mode: int = 0o644, replace: bool = True) -> None:
    """Write beside `file`, flush to the disk, rename. A crash leaves the old content or the new, never a part.

    With `replace=False` a file that exists by then stays as it is.
    """
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as temporary:
            temporary.write(data)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.chmod(name, mode)
        if replace:
            os.replace(name, file)
            return
        with suppress(FileExistsError):
            os.link(name, file)
        os.unlink(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
