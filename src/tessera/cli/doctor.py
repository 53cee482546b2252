"""`tessera doctor`: what this machine can do, and what is wrong with its set-up.

Each check is a function that returns one finding or several; one that fails is a finding itself. The checks are in
`doctor_machine` (hardware, limits, clock), `doctor_network` (links, relays, the router) and `doctor_state` (disk, keys,
backup).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import typer

from tessera import __version__
from tessera.cli.findings import SIGNS, Finding
from tessera.core.errors import TesseraError

__all__ = ["run_doctor"]


def run_doctor(state_dir: Path, as_json: bool, *, relays: Iterable[str] = (), quota_bytes: int | None = None) -> None:
    """Print one line for each finding; exits with 1 when something must be mended."""
    from tessera.cli import doctor_machine, doctor_network, doctor_state

    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        *doctor_machine.CHECKS,
        ("links", lambda: doctor_network.check_links(state_dir, list(relays))),
        *doctor_network.CHECKS,
        ("disk", lambda: doctor_state.check_disk(state_dir, quota_bytes)),
        ("disk speed", lambda: doctor_state.check_disk_speed(state_dir)),
        ("state", lambda: doctor_state.check_state(state_dir)),
        ("keys", lambda: doctor_state.check_keys(state_dir)),
        ("backup", lambda: doctor_state.check_backup(state_dir)),
    ]
    findings = [finding for name, check in checks for finding in _run(name, check)]
    if as_json:
        typer.echo(json.dumps({"version": __version__, "findings": [asdict(f) for f in findings]}))
    else:
        _print(findings)
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)


def _run(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """A check that fails must not hide what the others find."""
    try:
        found = check()
    except TesseraError as error:
        return [Finding(name, "problem", error.message)]
    except (OSError, ValueError) as error:
        return [Finding(name, "warning", f"could not be checked: {error}")]
    return found if isinstance(found, list) else [found]


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for finding in findings:
        sign, style = SIGNS[finding.verdict]
        line = Text.assemble((sign, style), f" {finding.what}: {finding.detail}")
        if finding.fix:
            line.append(f"  → {finding.fix}", style="dim")
        console.print(line, highlight=False, soft_wrap=True)
