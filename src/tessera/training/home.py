"""A state directory: the keys, the settings, the blobs, and one folder for each run. One process at a time works in it.

Layout:  version  lock  *.key  config.toml  blobs/  logs/  runs/<run id>/
Secrets are files that only their owner may read. Every file is written beside itself and renamed, so a crash leaves
the old one or the new one. `version` numbers the layout: an older one is brought forward when the directory is opened
(`migrations`), a newer one is refused.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import structlog

from tessera.core.errors import Conflict, Invalid, Missing
from tessera.core.ids import RunId
from tessera.core.signing import AccountKey, PeerKey
from tessera.training.files import drop_leftovers, write_atomic
from tessera.training.keystore import Keyring
from tessera.training.migrations import MIGRATIONS, STATE_VERSION, Migration, migrate

__all__ = ["Home", "write_atomic"]

log = structlog.get_logger()

OWN = {"config.toml", "logs"}  # what may be there before the first start


class Home:
    """The state directory at `path`, created when missing.

    Keys that lie open are checked at once. Protected ones are opened when they are first used, with what
    `passphrase.use_passphrases` was told: a command that only looks never asks.

    Raises: Invalid when the folder holds something else, a damaged state or one of a newer Tessera; Conflict when it
    must be brought forward while another process works in it. The message names the file.
    """

    def __init__(self, path: Path, migrations: Sequence[Migration] = MIGRATIONS) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            entries = {entry.name for entry in path.iterdir()}
        except (OSError, ValueError) as error:
            raise Invalid(f"cannot use {path} as a state directory: {error}") from error
        self._check_version(entries, migrations)
        self.keys = Keyring(path)
        self.keys.ensure("peer")
        self.keys.ensure("account")

    @classmethod
    def existing(cls, path: Path) -> Home:
        """As the constructor, but raises `Missing` rather than create a new identity."""
        if not (path / "version").exists():
            raise Missing(f"no Tessera state in {path}: give the --state-dir that you joined or started with")
        return cls(path)

    @cached_property
    def peer_key(self) -> PeerKey:
        """Who this directory is among peers. Raises what `Keyring.secret` does."""
        return PeerKey(self.keys.secret("peer"))

    @cached_property
    def account_key(self) -> AccountKey:
        """The account that is paid. Raises what `Keyring.secret` does."""
        return AccountKey(self.keys.secret("account"))

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def account(self, name: str) -> AccountKey:
        """A further account of this directory's owner, in `<name>.key`; created at first use."""
        self.keys.ensure(name)
        return AccountKey(self.keys.secret(name))

    def run_folder(self, run_id: RunId) -> Path:
        folder = self.path / "runs" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def runs(self) -> list[RunId]:
        """The runs that this directory knows, newest last."""
        folders = sorted((self.path / "runs").glob("*"), key=lambda folder: folder.stat().st_mtime)
        return [RunId(folder.name) for folder in folders if folder.is_dir()]

    def usage(self) -> dict[str, int]:
        """Bytes on disk of each kind: blobs, checkpoints, books, logs, chain, other; and all of them."""
        sizes = dict.fromkeys(("blobs", "checkpoints", "books", "logs", "chain", "other"), 0)
        for folder, _, names in os.walk(self.path):
            for name in names:
                file = Path(folder, name)
                try:
                    sizes[_kind(file.relative_to(self.path))] += file.stat().st_blocks * 512
                except FileNotFoundError:  # a file that was renamed meanwhile
                    continue
        return {**sizes, "all": sum(sizes.values())}

    def blob_quota(self, quota_bytes: int | None) -> int | None:
        """What a quota for the whole directory leaves for blobs, now; never less than 1 MiB, None = no limit."""
        if quota_bytes is None:
            return None
        usage = self.usage()
        return max(1 << 20, quota_bytes - (usage["all"] - usage["blobs"]))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process. Raises `Conflict` when another process holds it."""
        with _locked(self.path):
            for folder in (self.path, *(self.path / "runs").glob("*")):
                for gone in drop_leftovers(folder):
                    log.info("leftover_removed", file=str(gone))
            yield

    def _check_version(self, entries: set[str], migrations: Sequence[Migration]) -> None:
        file = self.path / "version"
        if "version" not in entries:
            foreign = sorted(name for name in entries - OWN if not name.startswith("."))
            if foreign:
                raise Invalid(f"{self.path} is not a Tessera state directory: it holds {', '.join(foreign[:5])}")
            write_atomic(file, str(migrations[-1].to if migrations else STATE_VERSION).encode())
            return
        if migrate(self.path, migrations, look_only=True):
            with _locked(self.path):
                migrate(self.path, migrations)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(32).strip() or "unknown"
            raise Conflict(f"{path} is in use by process {holder}: stop it, or give another --state-dir") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _kind(file: Path) -> str:
    """
    >>> _kind(Path("runs/ab/checkpoints/step-000000010.ckpt"))
    'checkpoints'
    """
    if "blobs" in file.parts[:-1]:
        return "blobs"
    if "logs" in file.parts[:-1] or ".log" in file.suffixes:
        return "logs"
    if file.suffix == ".ckpt":
        return "checkpoints"
    if ".sqlite" in file.name:
        return "chain" if file.name.startswith("chain") else "books"
    return "other"
