"""Text to learn from, found on this machine: the sources of Python's standard library, or an owner's files.

A source is a list of files that are read piece by piece, so that no file has to fit into memory, and from any place, so
that an interrupted preparation goes on. Files are read in the order of their relative paths. About one document in
sixteen is put aside for validation, by SHA-256 of the relative path (a text file) or of the text itself (a row), so
the split is the same on every machine that has the same files.

Nothing in a file is believed: a bad row is skipped and counted, too many of them are an error, and no file can make us
hold more than a piece of it.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Protocol

from tessera.core.errors import Invalid
from tessera.core.hashing import sha256

__all__ = ["FileReader", "Piece", "Skipped", "Source", "TextReader", "aside", "open_source", "read_standard_library"]

FILES_LIMIT = 100_000
PIECE_BYTES = 2**20
LIBRARY_FILE_LIMIT = 2 * 2**20  # bytes; longer files of the library are tables more often than text
BAD_SHARE = 0.05  # of the rows: more than that is no damage but another format
BAD_FREE = 20  # rows that may be bad before the share counts
_NAMED = 5  # reasons that are kept
_VALIDATION = 16  # one document in so many

# Not prose or code that people write: tests, other people's packages, generated character tables.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    text: str
    aside: bool  # for validation
    ends: bool  # the document ends with it
    after: int  # where to go on reading: what `FileReader.read` takes


@dataclass
class Skipped:
    """What could not be used."""

    files: int = 0
    rows: int = 0
    used: int = 0  # rows, for the share
    reasons: list[str] = field(default_factory=list)

    def file(self, name: str, reason: str) -> None:
        self.files += 1
        self._note(f"{name}: {reason}")

    def row(self, name: str, number: str, reason: str) -> None:
        """Raises `Invalid` when this is one too many."""
        self.rows += 1
        self._note(f"{name}, {number}: {reason}")
        if self.rows > BAD_FREE + BAD_SHARE * self.used:
            raise Invalid(
                f"{self.rows} rows cannot be used beside {self.used} good ones, {BAD_SHARE:.0%} may be bad: "
                + "; ".join(self.reasons)
            )

    def copy(self) -> Skipped:
        return replace(self, reasons=list(self.reasons))

    def _note(self, reason: str) -> None:
        if len(self.reasons) < _NAMED:
            self.reasons.append(reason)


class FileReader(Protocol):
    """Reads one kind of file."""

    def read(self, path: Path, name: str, offset: int, skipped: Skipped) -> Iterator[Piece]:
        """The pieces from `offset` on: 0, or what a piece said. `name` is the path as the source lists it."""
        ...


@dataclass(frozen=True)
class Source:
    """Files to learn from; `open_source` and `read_standard_library` make one."""

    description: str
    root: Path
    files: tuple[str, ...]  # relative to `root`, sorted
    readers: dict[str, FileReader]  # by suffix; "" reads all others

    def read(self, number: int, offset: int, skipped: Skipped) -> Iterator[Piece]:
        """The pieces of file `number`, from `offset` on."""
        name = self.files[number]
        reader = self.readers.get(Path(name).suffix.lower(), self.readers[""])
        return reader.read(self.root / name, name, offset, skipped)

    def fingerprint(self) -> str:
        """64 hex digits that change when a file does: of names, sizes, times of change and how they are read."""
        parts = []
        for name in self.files:
            try:
                facts = (self.root / name).stat()
            except OSError:
                continue  # reading it says so
            parts.append(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        kinds = sorted(f"{suffix}={reader!r}" for suffix, reader in self.readers.items())
        return sha256("\n".join(kinds).encode(), b"\0", *parts).hex()


@dataclass(frozen=True)
class TextReader:
    """A file is a document. Longer ones than a piece are cut, at the end of a line where there is one.

    `limit`: longer files are skipped; 0 = none is too long.
    """

    limit: int = 0

    def read(self, path: Path, name: str, offset: int, skipped: Skipped) -> Iterator[Piece]:
        try:
            size = path.stat().st_size if path.is_file() else -1
            if size < 0 or (self.limit and size > self.limit):
                skipped.file(name, "no file" if size < 0 else f"over {self.limit >> 20} MB")
                return
            with path.open("rb") as file:
                file.seek(offset)
                yield from self._pieces(file, offset, aside(name.encode()))
        except (OSError, ValueError) as error:  # what came before the bad place is used
            skipped.file(name, error.strerror or str(error) if isinstance(error, OSError) else str(error))

    def _pieces(self, file: IO[bytes], offset: int, is_aside: bool) -> Iterator[Piece]:
        held = b""
        while True:
            data = held + file.read(PIECE_BYTES - len(held))
            following = file.read(1)
            cut = len(data) if not following else _cut(data)
            held = data[cut:] + following
            text, begun = _text(data[:cut]), offset > 0
            offset += cut
            if text.strip() or (text and begun):
                yield Piece(text, is_aside, not held, offset)
            if not held:
                return


def aside(basis: bytes) -> bool:
    """Whether the document that `basis` names validates."""
    return sha256(basis)[0] % _VALIDATION == 0


def read_standard_library() -> Source:
    """The .py files of this Python's standard library, without tests. About 10 MB, documentation strings included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _names(root, (".py",), _SKIPPED)
    description = f"Python {sysconfig.get_python_version()} standard library"
    return Source(description, root, files, {"": TextReader(LIBRARY_FILE_LIMIT)})


def open_source(path: Path, *, field: str = "text") -> Source:
    """The file `path`, or every file in the folder and below; hidden ones are skipped.

    `.jsonl`, `.ndjson` and `.parquet` hold rows, whose `field` is the text; everything else is UTF-8 text or skipped.

    Raises: Invalid: nothing there, no right to read, too many files, or Parquet without pyarrow.
    """
    from tessera.models.corpus_parquet import Parquet
    from tessera.models.corpus_rows import JsonLines

    if not path.exists():
        raise Invalid(f"no such file or folder: {path}")
    root, files = (path.parent, (path.name,)) if path.is_file() else (path, _names(path, (), frozenset()))
    readers: dict[str, FileReader] = {"": TextReader(), ".jsonl": JsonLines(field), ".ndjson": JsonLines(field)}
    if any(name.lower().endswith(".parquet") for name in files):
        readers[".parquet"] = Parquet.checked(field)
    return Source(str(path), root, files, readers)


def _names(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> tuple[str, ...]:
    names: list[str] = []

    def refuse(error: OSError) -> None:
        raise Invalid(f"cannot read {error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        for file in files:
            if not file.startswith(".") and (not suffixes or file.endswith(suffixes)):
                names.append((Path(folder) / file).relative_to(root).as_posix())
        if len(names) > FILES_LIMIT:
            raise Invalid(f"{root} holds over {FILES_LIMIT} files: join them into larger ones, one row each")
    return tuple(sorted(names))


def _cut(data: bytes) -> int:
    """Where to cut `data`, which goes on: after its last line, or else before the last whole character."""
    if (line := data.rfind(b"\n")) >= len(data) // 2:
        return line + 1
    end = len(data) - 1
    while end > len(data) - 4 and data[end] & 0xC0 == 0x80:
        end -= 1
    return end if end > 0 else len(data)


def _text(data: bytes) -> str:
    if b"\0" in data:
        raise ValueError("binary: it holds a zero byte")
    return data.decode()  # a UnicodeDecodeError is a ValueError
