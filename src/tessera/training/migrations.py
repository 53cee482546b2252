"""A state directory of an older layout becomes one of ours, step by step, each with a copy of what it changes.

    .before-<n>/   the files that the step from version n changes, as they were; kept until the next step

`version` is written last. A step that was interrupted is undone from its copy and done again, so a step need not be
able to go on from its own middle. The caller holds the directory's lock.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from tessera.core.errors import Invalid, Unavailable
from tessera.training.files import write_atomic

__all__ = ["MIGRATIONS", "STATE_VERSION", "Migration", "migrate"]

log = structlog.get_logger()

STATE_VERSION = 1


@dataclass(frozen=True)
class Migration:
    """From layout `to - 1` to layout `to`."""

    to: int
    changes: tuple[str, ...]  # globs, relative to the directory, of the files that it changes, moves or removes
    apply: Callable[[Path], None]


MIGRATIONS: tuple[Migration, ...] = ()


def migrate(state: Path, migrations: Sequence[Migration] = MIGRATIONS, *, look_only: bool = False) -> bool:
    """Bring `state` forward. Returns whether anything had to be done.

    Raises: Invalid for a version that cannot be read or is newer than ours, both named; Unavailable when the disk does
    not take the copy: then nothing has changed.
    """
    ours = migrations[-1].to if migrations else STATE_VERSION
    found = _version(state)
    if found > ours:
        raise Invalid(
            f"{state} has layout {found}, of a newer Tessera; this one knows layouts up to {ours}: upgrade, or restore "
            "a backup that this version made"
        )
    steps = [step for step in migrations if step.to > found]
    if [step.to for step in steps] != list(range(found + 1, ours + 1)):
        raise Invalid(f"{state} has layout {found}, and there is no way from it to layout {ours}")
    if look_only:
        return bool(steps)
    for step in steps:
        _take(state, step)
    return bool(steps)


def _take(state: Path, step: Migration) -> None:
    copy = state / f".before-{step.to - 1}"
    try:
        if copy.is_dir():
            log.warning("migration_undone", to=step.to)
            _undo(state, copy)
        else:
            for old in state.glob(".before-*"):
                shutil.rmtree(old)
            _copy(state, step, copy)
    except OSError as error:
        raise Unavailable(
            f"cannot copy what changes in {state} for its new layout: {error.strerror or error}; nothing has changed",
            retry_after_s=30.0,
        ) from error
    step.apply(state)
    write_atomic(state / "version", str(step.to).encode())
    log.info("state_migrated", state=str(state), to=step.to, copy=str(copy))


def _copy(state: Path, step: Migration, copy: Path) -> None:
    """Under another name first: a copy that has its name is whole."""
    partial = copy.with_name(copy.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    for file in _files(state, step):
        target = partial / file.relative_to(state)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    partial.rename(copy)


def _undo(state: Path, copy: Path) -> None:
    for file in (file for file in copy.rglob("*") if file.is_file()):
        target = state / file.relative_to(copy)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)


def _files(state: Path, step: Migration) -> list[Path]:
    found = {file for pattern in step.changes for file in state.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.relative_to(state).parts[0].startswith(".before-"))


def _version(state: Path) -> int:
    file = state / "version"
    text = file.read_bytes()[:32].decode(errors="replace").strip()
    if not (text.isascii() and text.isdigit()):
        raise Invalid(f"{file} says version {text!r}: a number is expected; restore it from your backup")
    return int(text)
