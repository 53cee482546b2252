"""A stage's checkpoints on disk: the first, the last few, and what is held; each with its SHA-256, never half of one.

Held are the steps to which the run may have to go back because another stage returns from a snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tessera.core.errors import Invalid, Missing, Unavailable
from tessera.core.hashing import sha256
from tessera.training.home import write_atomic

__all__ = ["Checkpoints"]

_NAME = re.compile(r"step-(\d{9})\.ckpt")
_DIGEST_BYTES = 32


class Checkpoints:
    """Files `step-<n>.ckpt` in `folder`: a digest, then what the trainer saved. Step 0 and the newest `keep` stay.

    Args:
        reading: only, while another process may write here: nothing is made or cleared away.
    """

    def __init__(self, folder: Path, keep: int = 3, *, reading: bool = False) -> None:
        self._folder, self._keep = folder, keep
        self._held: frozenset[int] = frozenset()
        if reading:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps that can be loaded, ascending. Not yet checked for damage."""
        matches = (_NAME.fullmatch(file.name) for file in self._folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def hold(self, steps: Iterable[int]) -> None:
        """From now on these stay as well, and no others; one that is let go leaves with the next `save`."""
        self._held = frozenset(steps)

    def save(self, step: int, data: bytes) -> None:
        """Raises `Unavailable` when the disk does not take it; the older ones are there still."""
        try:
            write_atomic(self._file(step), sha256(data) + data)
        except OSError as error:
            need = f"{len(data) / 1e6:.1f} MB"
            raise Unavailable(
                f"cannot write a checkpoint of {need} in {self._folder}: {error.strerror or error}; "
                "training goes on when there is room",
                retry_after_s=30.0,
            ) from error
        for old in [s for s in self.steps() if 0 < s <= step][: -self._keep]:
            if old not in self._held:
                self._file(old).unlink(missing_ok=True)

    def load(self, step: int) -> bytes:
        """Raises `Missing` when there is none, `Invalid` when it is damaged (and then drops it)."""
        file = self._file(step)
        try:
            content = file.read_bytes()
        except FileNotFoundError as error:
            raise Missing(f"no checkpoint of step {step} in {self._folder}") from error
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if sha256(data) != digest:
            file.unlink(missing_ok=True)
            raise Invalid(f"the checkpoint {file} was damaged and is dropped; training resumes from an older one")
        return data

    def describe(self, step: int) -> tuple[int, str]:
        """Bytes and SHA-256 of what `save` was given, as noted then; not checked. Raises `Missing`."""
        try:
            with self._file(step).open("rb") as file:
                digest = file.read(_DIGEST_BYTES)
                return file.seek(0, 2) - _DIGEST_BYTES, digest.hex()
        except FileNotFoundError as error:
            raise Missing(f"no checkpoint of step {step} in {self._folder}") from error

    def read(self, step: int, offset: int, size: int) -> bytes:
        """At most `size` bytes of what `save` was given, from `offset` on; not checked. Raises `Missing`."""
        try:
            with self._file(step).open("rb") as file:
                file.seek(_DIGEST_BYTES + offset)
                return file.read(size)
        except FileNotFoundError as error:
            raise Missing(f"no checkpoint of step {step} in {self._folder}") from error

    def drop_after(self, step: int) -> None:
        """Forget later checkpoints: the run goes on from `step`."""
        for later in [s for s in self.steps() if s > step]:
            self._file(later).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}.ckpt"
