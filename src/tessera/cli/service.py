"""`tessera service …`: keep a command running across crashes and restarts of the machine, with systemd."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.config import hides_secret
from tessera.cli.options import default_state_dir
from tessera.cli.settings import current_settings
from tessera.cli.tree import Setting, find_command, inspect_command
from tessera.cli.unit_file import MARK, UnitFile
from tessera.core.errors import Conflict, Invalid, Missing

__all__ = ["service_app"]

LASTING = (("join",), ("relay",), ("up",), ("run", "create"))
SYSTEM_FOLDER = Path("/etc/systemd/system")
PATIENCE_S = 5.0

service_app = typer.Typer(help="Run a command as a service of systemd.", no_args_is_help=True)

ForSystem = Annotated[
    bool | None,
    typer.Option("--system/--user", help="For the machine, or for this user. Default: for the machine when root."),
]
Name = Annotated[str, typer.Option(help="The service's name. Default: tessera- and the command's.")]


@service_app.command(
    "install",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def service_install(
    ctx: typer.Context,
    words: Annotated[
        list[str], typer.Argument(help="join, relay, up or run create, with its options.", metavar="COMMAND…")
    ],
    system: ForSystem = None,
    name: Name = "",
    run_as: Annotated[str, typer.Option(help="The user of a --system service. Default: who types this.")] = "",
    memory_max: Annotated[str, typer.Option(help="Most memory that it may take: 8G.")] = "",
    only_print: Annotated[bool, typer.Option("--print", help="Print the unit, write nothing.")] = False,
) -> None:
    """Write a unit that runs COMMAND as it would run now, and say how to start it."""
    system = _for_system(system)
    path, rest = find_command(ctx, words)
    if path not in LASTING:
        raise Invalid(f"a service runs {', '.join(' '.join(one) for one in LASTING)}; not {' '.join(words)!r}")
    settings = inspect_command(ctx, path, rest).own
    state_dir = next((Path(setting.value) for setting in settings if setting.key == "state_dir"), None)
    _check_secrets(settings, state_dir)
    unit = UnitFile(
        description=f"Tessera: {' '.join(path)}",
        command=_command(path, rest, settings, state_dir),
        writable=[] if state_dir is None else [state_dir.absolute()],
        system=system,
        user=run_as or os.environ.get("SUDO_USER") or getpass.getuser(),
        environment=_environment(settings),
        passphrase_file=_passphrase_file(),
        memory_max=memory_max,
    )
    if only_print:
        typer.echo(unit.text(), nl=False)
        return
    if path == ("join",) and state_dir is not None and not (state_dir / "invitation").exists():
        raise Missing(f"{state_dir} has joined no run yet: say yes to `tessera join INVITATION` once, then install")
    _install(unit, _folder(system) / f"{name or '-'.join(('tessera', *path))}.service", state_dir, system)


@service_app.command("uninstall")
def service_uninstall(name: Annotated[str, typer.Argument()] = "tessera-join", system: ForSystem = None) -> None:
    """Remove a unit that `install` wrote. Keys and state stay."""
    system = _for_system(system)
    file = _folder(system) / f"{name}.service"
    if not file.exists():
        raise Missing(f"there is no {file}: `tessera service status` lists them")
    if not file.read_text(errors="replace").startswith(MARK):
        raise Conflict(f"{file} was not written by `tessera service install`: nothing was changed")
    running = _systemctl(system, "is-active", name) in ("active", "activating")
    if running:
        raise Conflict(f"{name} is running: {_ctl(system)} disable --now {name}; then uninstall again")
    file.unlink()
    typer.echo(f"{file} is gone. Next: {_ctl(system)} daemon-reload")


@service_app.command("status")
def service_status(system: ForSystem = None) -> None:
    """The services that `install` wrote, and whether they run."""
    found = False
    for kind in (True, False) if system is None else (system,):
        for file in sorted(_folder(kind).glob("*.service")):
            if file.is_file() and file.read_text(errors="replace").startswith(MARK):
                found = True
                state = _systemctl(kind, "is-active", file.stem) or "unknown: systemd does not answer"
                typer.echo(f"{file.stem}  {'system' if kind else 'user'}  {state}  {file}")
    if not found:
        typer.echo("No service is installed: tessera service install join")


# --- inside -----------------------------------------------------------------------------------------------------------


def _install(unit: UnitFile, file: Path, state_dir: Path | None, system: bool) -> None:
    from tessera.training.files import write_atomic

    text = unit.text()
    if file.exists() and not file.read_text(errors="replace").startswith(MARK):
        raise Conflict(f"{file} was not written by `tessera service install`: nothing was changed")
    try:
        if state_dir is not None and not state_dir.exists():  # systemd cannot open what is not there
            state_dir.mkdir(mode=0o700, parents=True)
            if system:
                shutil.chown(state_dir, unit.user)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text.encode())
    except LookupError as error:
        raise Invalid(f"--run-as: there is no user {unit.user!r} on this machine") from error
    except OSError as error:
        raise Invalid(f"cannot write {file}: {error.strerror}; with --user it needs no rights") from error
    typer.echo(f"{file} is written. Next:")
    typer.echo(f"  {_ctl(system)} daemon-reload")
    typer.echo(f"  {_ctl(system)} enable --now {file.stem}")
    if not system:
        typer.echo(f"  loginctl enable-linger {getpass.getuser()}    # so that it runs while you are not logged in")
    typer.echo(f"Its log: journalctl {'' if system else '--user '}-u {file.stem} -f, or tessera logs -f")
    if state_dir is not None and _protected(state_dir) and unit.passphrase_file is None:
        typer.echo(
            "The keys are protected and a service cannot be asked: install again with "
            "TESSERA_PASSPHRASE_FILE naming a file of mode 600",
            err=True,
        )


def _command(path: Sequence[str], words: list[str], settings: list[Setting], state_dir: Path | None) -> list[str]:
    """As typed, but with whole paths, the state directory said, and no question."""
    command = [sys.executable, "-m", "tessera", *path]
    if state_dir is not None:
        command += ["--state-dir", str(state_dir.absolute())]
    if any(setting.key == "yes" for setting in settings):
        command.append("--yes")
    previous = ""
    for word in words:
        if previous == "--state-dir" or word in ("--yes", "-y", "--state-dir") or word.startswith("--state-dir="):
            previous = word
            continue
        previous = word
        command.append(str(Path(word).absolute()) if not word.startswith("-") and Path(word).exists() else word)
    return command


def _environment(settings: list[Setting]) -> dict[str, str]:
    """The variables that count now, so that the service works with what works here."""
    kept = {one.source: os.environ[one.source] for one in settings if one.kind == "environment"}
    kept = {name: value for name, value in kept.items() if not name.endswith("_STATE_DIR")}
    for name in ("TESSERA_CONFIG_DIR", "XDG_CONFIG_HOME", "TESSERA_LOG", "TESSERA_LOG_FORMAT", "OMP_NUM_THREADS"):
        if os.environ.get(name):
            kept[name] = os.environ[name]
    return {**kept, "PYTHONUNBUFFERED": "1"}


def _check_secrets(settings: list[Setting], state_dir: Path | None) -> None:
    for setting in settings:
        if setting.kind in ("flag", "environment") and hides_secret(setting):
            where = (state_dir or default_state_dir("relay")) / "config.toml"
            raise Invalid(
                f"{setting.source} holds a secret, and everybody can read a unit: put {setting.key} into {where} "
                "(or into the user's config.toml), mode 600"
            )


def _passphrase_file() -> Path | None:
    file = current_settings().passphrase_file
    return None if file is None else file.absolute()


def _protected(state_dir: Path) -> bool:
    from tessera.training.keystore import Keyring

    return Keyring(state_dir).protected


def _for_system(chosen: bool | None) -> bool:
    return os.geteuid() == 0 if chosen is None else chosen


def _folder(system: bool) -> Path:
    if system:
        return SYSTEM_FOLDER
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "systemd" / "user"


def _ctl(system: bool) -> str:
    return "systemctl" if system else "systemctl --user"


def _systemctl(system: bool, *words: str) -> str:
    """What systemctl answers; "" when there is none, or it does not answer in time."""
    program = shutil.which("systemctl")
    if program is None:
        return ""
    scope: list[Any] = [] if system else ["--user"]
    try:
        done = subprocess.run(
            [program, *scope, *words], capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
