"""What one worker holds of other stages' snapshots: on disk, the newest two of each stage, within a share for each.

For each snapshot a `<digest>.head` (header and share of the key), and `<digest>.part`, which becomes `<digest>.data`
once it is whole and right. Nobody but the owner may read them. A stage has its own part of the quota, so that whatever
its workers announce is at their own stage's cost; each may have one fragment under way. All methods block and may be
called from any thread; the lock guards the table, never the disk.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing, Refused, Unavailable
from tessera.core.ids import PeerId
from tessera.p2p.blob_disk import disk, open_file, write_all
from tessera.training.files import write_atomic
from tessera.training.snapshot_code import share_hash
from tessera.training.snapshot_header import Moment, SnapshotHeader, is_overtaken

__all__ = ["KEPT", "Shelf"]

log = structlog.get_logger()

KEPT = 2  # snapshots of one stage: a newer one may not have reached enough others
HEAD_LIMIT = 64 * 1024  # bytes
PIECE = 1 << 20


@dataclass
class _Entry:
    """One snapshot's piece. `have` bytes of the fragment are here; `whole` once they hash right."""

    header: SnapshotHeader
    number: int
    share: str
    have: int = 0
    whole: bool = False
    closing: bool = False

    @property
    def moment(self) -> Moment:
        return self.header.moment

    def state(self) -> tuple[int, bool]:
        """Raises `Unavailable` while it is being checked."""
        if self.closing and not self.whole:
            raise Unavailable("the fragment is being checked: ask again", retry_after_s=1.0)
        return self.have, self.whole


class Shelf:
    """The pieces in `folder` that are `peer`'s.

    Args:
        stage_bytes: most that the fragments of one stage's snapshots may take; one, at most half of it.
    """

    def __init__(self, folder: Path, *, peer: PeerId, stage_bytes: int) -> None:
        self._folder, self._peer, self._stage_bytes = folder, peer, stage_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._load()

    def headers(self, stage: int | None = None) -> list[SnapshotHeader]:
        """Of what is whole, newest first; of one stage, or of all."""
        with self._lock:
            whole = [e.header for e in self._entries.values() if e.whole and stage in (None, e.header.stage)]
        return sorted(whole, key=lambda header: header.moment, reverse=True)

    def begin(self, header: SnapshotHeader, share: str) -> tuple[int, bool]:
        """Make room for a piece; how many bytes of it are here already, and whether it is whole.

        The header must have been checked.

        Raises: Invalid when no piece is ours; Misbehaviour for another share than the header's; Conflict for a
        snapshot older than those that are kept; Refused, rule `quota`; Unavailable for a disk that refuses.
        """
        number = header.number_of(self._peer)
        if share_hash(share) != header.pieces[number].share:
            raise Misbehaviour("the share of the key is not the one in the header", evidence=header.to_value())
        if header.fragment_bytes > self._stage_bytes // 2:
            raise Refused(
                f"a fragment of {header.fragment_bytes:,} bytes, at most {self._stage_bytes // 2:,} for one stage",
                rule="quota",
            )
        with self._lock:
            known = self._entries.get(header.digest)
            if known is not None:
                return known.state()
            gone = self._give_way(header)
            entry = self._entries[header.digest] = _Entry(header, number, share)
        self._discard(gone)
        try:
            with disk(self._folder):
                write_atomic(self._file(header.digest, ".head"), _head(header, share), mode=0o600)
                os.close(open_file(self._file(header.digest, ".part")))
        except BaseException:
            self._drop(entry)
            raise
        return 0, False

    def write(self, maker: PeerId, digest: str, offset: int, data: bytes) -> tuple[int, bool]:
        """Take some of a fragment, from its maker; how many bytes are here now, and whether it is whole.

        Raises: Missing for a snapshot that was not begun, or was given up for a newer one; Conflict for bytes that do
        not follow; Invalid for too many; Misbehaviour when the whole is not what its header says; Unavailable.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None or entry.header.maker != maker:
                raise Missing("this snapshot was not begun, or gave way to a newer one: begin again")
            if entry.state()[1]:
                return entry.state()
            if offset > entry.have or offset < 0:
                raise Conflict(f"{entry.have:,} bytes are here, the next ones begin at {offset:,}", have=entry.have)
            if offset + len(data) > entry.header.fragment_bytes:
                raise Invalid(f"a fragment of {entry.header.fragment_bytes:,} bytes ends before {offset + len(data):,}")
        self._write_part(digest, offset, data)
        with self._lock:
            entry.have = max(entry.have, offset + len(data))
            if entry.closing or entry.have < entry.header.fragment_bytes:
                return entry.state()
            entry.closing = True
        self._finish(entry)
        return entry.have, True

    def read(self, digest: str, offset: int, size: int) -> tuple[str, bytes]:
        """The share of the key, and at most `size` bytes of the fragment from `offset` on.

        The first bytes of a fragment are given out only when all of it is right: a damaged disk must not make us look
        like a liar. Raises: Missing; Invalid for an offset outside; Unavailable when it is damaged, and dropped now.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None or not entry.whole:
                raise Missing("this snapshot is not held here")
        if not 0 <= offset < entry.header.fragment_bytes:
            raise Invalid(f"a fragment of {entry.header.fragment_bytes:,} bytes does not go on at {offset:,}")
        file = self._file(digest, ".data")
        try:
            if offset == 0 and _hash(file) != entry.header.pieces[entry.number].fragment:
                raise OSError("its bytes changed on the disk")
            with file.open("rb") as opened:
                opened.seek(offset)
                return entry.share, opened.read(size)
        except OSError as error:
            log.error("snapshot_damaged", stage=entry.header.stage, step=entry.header.step, reason=str(error))
            self._drop(entry)
            raise Unavailable("this snapshot was damaged here: ask another holder") from error

    def drop_after(self, moment: Moment) -> None:
        """The run went back to `moment.step` in that session: forget what earlier sessions reached later."""
        with self._lock:
            entries = list(self._entries.values())
            left = [e for e in entries if e.moment.session < moment.session and e.moment.step > moment.step]
            gone = self._take_out(left)
        self._discard(gone)

    def header(self, digest: str) -> SnapshotHeader:
        """Raises `Missing` unless it is whole."""
        with self._lock:
            entry = self._entries.get(digest)
        if entry is None or not entry.whole:
            raise Missing("this snapshot is not held here")
        return entry.header

    # --- inside -----------------------------------------------------------------------------------------------------

    def _give_way(self, header: SnapshotHeader) -> list[str]:
        """Take out of the table what leaves for `header`. The lock is held."""
        mine = [entry for entry in self._entries.values() if entry.header.stage == header.stage]
        whole = sorted((entry for entry in mine if entry.whole), key=lambda entry: entry.moment)
        parts = [entry for entry in mine if not entry.whole]
        newer = [entry for entry in whole if entry.moment > header.moment]
        if len(newer) >= KEPT or any(entry.moment > header.moment for entry in parts):
            raise Conflict(f"newer snapshots of stage {header.stage} than step {header.step} are held here")
        if is_overtaken(header.moment, (entry.moment for entry in whole)):
            raise Conflict(f"the run went back behind step {header.step} since session {header.session}")
        leaving = parts
        taken = header.fragment_bytes + sum(entry.header.fragment_bytes for entry in whole)
        while taken > self._stage_bytes:  # never the newest: two fragments always have room
            leaving.append(oldest := whole.pop(0))
            taken -= oldest.header.fragment_bytes
        return self._take_out(leaving)

    def _take_out(self, entries: Iterable[_Entry]) -> list[str]:
        return [entry.header.digest for entry in entries if self._entries.pop(entry.header.digest, None) is not None]

    def _write_part(self, digest: str, offset: int, data: bytes) -> None:
        try:
            fd = os.open(self._file(digest, ".part"), os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise Missing("this snapshot gave way to a newer one") from error
        try:
            with disk(self._folder):
                write_all(fd, data, offset)
        finally:
            os.close(fd)

    def _finish(self, entry: _Entry) -> None:
        """The last byte is here: keep the piece if it is right, and let older ones go."""
        digest = entry.header.digest
        part = self._file(digest, ".part")
        try:
            with disk(self._folder):
                right = _hash(part, sync=True) == entry.header.pieces[entry.number].fragment
                if right:
                    part.replace(self._file(digest, ".data"))
        except BaseException:
            self._drop(entry)
            raise
        if not right:
            self._drop(entry)
            raise Misbehaviour("the fragment is not the one in the header", evidence=entry.header.to_value())
        with self._lock:
            if digest not in self._entries:  # a newer one began meanwhile
                gone = [digest]
            else:
                entry.whole = True
                gone = self._take_out(self._surplus(entry))
        self._discard(gone)

    def _surplus(self, new: _Entry) -> list[_Entry]:
        """What a piece that has just become whole makes useless. The lock is held."""
        others = [e for e in self._entries.values() if e.whole and e.header.stage == new.header.stage and e is not new]
        replaced = [e for e in others if e.moment == new.moment or is_overtaken(e.moment, [new.moment])]
        kept = sorted((e for e in (*others, new) if e not in replaced), key=lambda e: e.moment)
        return replaced + kept[:-KEPT]

    def _drop(self, entry: _Entry) -> None:
        with self._lock:
            gone = self._take_out([entry])
        self._discard(gone)

    def _discard(self, digests: Iterable[str]) -> None:
        for digest in digests:
            for suffix in (".head", ".part", ".data"):  # the head first: without it, nothing is there
                self._file(digest, suffix).unlink(missing_ok=True)

    def _load(self) -> None:
        """What an earlier process left."""
        for file in sorted(self._folder.glob("*.head")):
            try:
                entry = self._read_entry(file)
            except Invalid as error:
                log.warning("snapshot_unreadable", file=file.name, reason=error.message)
                self._discard([file.stem])
                continue
            self._entries[entry.header.digest] = entry
        for file in (*self._folder.glob("*.part"), *self._folder.glob("*.data"), *self._folder.glob(".*.head.*")):
            if file.stem not in self._entries:
                file.unlink(missing_ok=True)

    def _read_entry(self, file: Path) -> _Entry:
        value = encoding.decode(file.read_bytes()[: HEAD_LIMIT + 1], HEAD_LIMIT)
        if not isinstance(value, dict) or value.keys() != {"header", "share"} or not isinstance(value["share"], str):
            raise Invalid("not the head of a snapshot")
        header = SnapshotHeader.from_value(value["header"])
        if header.digest != file.stem:
            raise Invalid("the head of another snapshot")
        entry = _Entry(header, header.number_of(self._peer), value["share"])
        for suffix in (".data", ".part"):
            try:
                entry.have = min(self._file(header.digest, suffix).stat().st_size, header.fragment_bytes)
            except FileNotFoundError:
                continue
            entry.whole = suffix == ".data"
            if suffix == ".part" and entry.have == header.fragment_bytes:
                entry.have -= 1  # its last byte comes again, and then it is checked
            return entry
        raise Invalid("a head without a fragment")

    def _file(self, digest: str, suffix: str) -> Path:
        return self._folder / f"{digest}{suffix}"


def _head(header: SnapshotHeader, share: str) -> bytes:
    value: dict[str, Any] = {"header": header.to_value(), "share": share}
    return encoding.encode(value)


def _hash(file: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        if sync:
            os.fsync(opened.fileno())
        while piece := opened.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
