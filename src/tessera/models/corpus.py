"""Text to learn from, found on this machine: the sources of Python's standard library, or a folder of text.

Files are read in the order of their relative paths and split by file: the SHA-256 of the relative path puts about
one file in sixteen aside for validation, so the split is the same on every machine that has the same files.
"""

from __future__ import annotations

import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tessera.core.errors import Invalid
from tessera.core.hashing import sha256

__all__ = ["Corpus", "read_folder", "read_standard_library"]

FILE_LIMIT = 2 * 2**20  # bytes; longer files are skipped, they are tables more often than text
TOTAL_LIMIT = 256 * 2**20  # bytes of text
FILES_LIMIT = 100_000
MINIMUM = 16 * 2**10  # bytes of text, under which nothing is learned
_VALIDATION = 16  # one file in so many

# Not prose or code that people write: tests, other people's packages, generated character tables.
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Documents, split. `source` says where they come from."""

    source: str
    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.train + self.validation)


def read_standard_library() -> Corpus:
    """The .py files of this Python's standard library, without tests. About 10 MB, documentation strings included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _read(root, f"Python {sysconfig.get_python_version()} standard library", (".py",), _SKIPPED)


def read_folder(path: Path) -> Corpus:
    """Every text file in `path` and below, or the one file that it names; hidden files and folders are skipped.

    A single file is split by position: its last sixteenth validates.

    Raises: Invalid: nothing there, no right to read, not UTF-8 text, or too little of it.
    """
    if not path.exists():
        raise Invalid(f"no such file or folder: {path}")
    if path.is_file():
        return _single(path.name, _text(path) or "", str(path))
    return _read(path, str(path), (), frozenset())


def _read(root: Path, source: str, suffixes: tuple[str, ...], skipped: frozenset[str]) -> Corpus:
    texts: dict[str, str] = {}
    unread: list[str] = []
    total = 0
    for name in _names(root, suffixes, skipped):
        text = _text(root / name)
        if text is None:
            unread.append(name)
        elif text.strip():
            texts[name] = text
            total += len(text)
        if total > TOTAL_LIMIT:
            raise Invalid(f"{source} holds over {TOTAL_LIMIT >> 20} MB of text: name a smaller folder")
    if not texts:
        reason = f"none of its {len(unread)} files is readable UTF-8 text" if unread else "it holds no text"
        raise Invalid(f"nothing to learn from {source}: {reason}")
    if len(texts) == 1:
        return _single(*next(iter(texts.items())), source)
    return _checked(_split(texts, source))


def _names(root: Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> list[str]:
    names: list[str] = []

    def refuse(error: OSError) -> None:
        raise Invalid(f"cannot read {error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        for file in files:
            if not file.startswith(".") and (not suffixes or file.endswith(suffixes)):
                names.append((Path(folder) / file).relative_to(root).as_posix())
        if len(names) > FILES_LIMIT:
            raise Invalid(f"{root} holds over {FILES_LIMIT} files: name a smaller folder")
    return sorted(names)


def _text(path: Path) -> str | None:
    """The file as text, or None if it is none: too large, binary, unreadable or a link to nowhere."""
    try:
        if not path.is_file() or path.stat().st_size > FILE_LIMIT:
            return None
        data = path.read_bytes()
    except OSError:
        return None  # counted by the caller, which says how many files it could not read
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _split(texts: dict[str, str], source: str) -> Corpus:
    ranked = sorted(texts, key=lambda name: sha256(name.encode()))
    aside = {name for name in texts if sha256(name.encode())[0] % _VALIDATION == 0}
    # A few files may fall on one side: the one with the lowest hash then moves.
    if not aside or len(aside) == len(texts):
        aside = {ranked[0]}
    return Corpus(
        source,
        tuple(text for name, text in texts.items() if name not in aside),
        tuple(text for name, text in texts.items() if name in aside),
    )


def _single(name: str, text: str, source: str) -> Corpus:
    if not text.strip():
        raise Invalid(f"nothing to learn from {name}: empty, over {FILE_LIMIT >> 20} MB, or no readable UTF-8 text")
    cut = len(text) * (_VALIDATION - 1) // _VALIDATION
    return _checked(Corpus(source, (text[:cut],), (text[cut:],)))


def _checked(corpus: Corpus) -> Corpus:
    if corpus.size_bytes < MINIMUM:
        raise Invalid(f"{corpus.source} holds {corpus.size_bytes} bytes of text, at least {MINIMUM} expected")
    return corpus
