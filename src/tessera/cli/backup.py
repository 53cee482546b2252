"""`tessera backup` and `tessera restore`: a node in one file, and a node out of one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import AsJson, StateDir, default_state_dir

__all__ = ["backup", "restore"]

TWICE = (
    "Never run one identity on two machines: make sure that the other one is gone before you start this one. Two nodes "
    "that sign with one key contradict each other, and peers hold that against it."
)


def backup(
    file: Annotated[Path, typer.Argument(help="The file to write, on another disk.")],
    plain: Annotated[bool, typer.Option("--plain", help="Do not encrypt.")] = False,
    blobs: Annotated[bool, typer.Option("--blobs", help="The data sets and other blobs too.")] = False,
    no_checkpoints: Annotated[bool, typer.Option("--no-checkpoints", help="Leave the model's parts out.")] = False,
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("worker"),
) -> None:
    """Copy this node's keys, settings, runs, receipts and chain into one encrypted file. The node may be at work."""
    from tessera.cli.passphrases import new_passphrase
    from tessera.training.backup import take_backup
    from tessera.training.home import Home

    home = Home.existing(state_dir)
    if plain:
        typer.echo("Not encrypted: whoever reads this file is you, and may move your money.", err=True)
    passphrase = None if plain else new_passphrase("for the backup (nobody can recover it)")
    taken = take_backup(home, file, passphrase, blobs=blobs, checkpoints=not no_checkpoints)
    if as_json:
        facts = {"file": str(file), "files": taken.files, "bytes": taken.size_bytes, "peer": taken.peer}
        typer.echo(json.dumps({**facts, "encrypted": not plain}))
        return
    typer.echo(f"{taken.files} files, {taken.size_bytes / 1e6:.1f} MB of {taken.peer[:16]}… are in {file}")
    typer.echo(f"To bring them back: tessera restore {file} --state-dir NEW", err=True)


def restore(
    file: Annotated[Path, typer.Argument(help="A backup.")],
    as_json: AsJson = False,
    state_dir: StateDir = default_state_dir("worker"),
) -> None:
    """Make a state directory, which must not exist yet, from a backup. Everything is checked first."""
    from tessera.training.backup_restore import restore_backup
    from tessera.training.passphrase import ask_passphrase

    back = restore_backup(file, state_dir, lambda: ask_passphrase("to open the backup"))
    if as_json:
        facts = {"state_dir": str(state_dir), "files": back.files, "bytes": back.size_bytes, "peer": back.peer}
        typer.echo(json.dumps({**facts, "created": back.created}))
        return
    when = datetime.fromtimestamp(back.created, UTC).strftime("%Y-%m-%d %H:%M UTC")
    typer.echo(f"{back.peer[:16]}… is back in {state_dir}, as it was on {when} ({back.files} files).")
    typer.echo(TWICE, err=True)
