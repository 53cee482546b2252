"""What a user installs: pinned throughout, complete as a wheel, and a plain word when something is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sources import ROOT

DIST = "tessera-network"


def _pins() -> dict[str, str]:
    rows = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): pin for name, pin in rows}


def _needed(extras: tuple[str, ...]) -> set[str]:
    """Every distribution that installing us with `extras` brings, ourselves not counted."""
    found: set[tuple[str, str]] = set()
    todo = [(DIST, extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for requirement in map(Requirement, requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in found} - {DIST}


def test_every_package_that_a_user_gets_is_pinned_and_installed_as_pinned() -> None:
    pins = _pins()
    needed = _needed(("train", "serve", "agents", "test"))
    assert needed - pins.keys() == set()
    wrong = {}
    for name in needed:
        found = version(name).partition("+")[0]  # torch's local version names its build
        if found != pins[name]:
            wrong[name] = (found, pins[name])
    assert wrong == {}


def test_no_pin_is_left_over() -> None:
    try:
        needed = _needed(("train", "serve", "agents", "data", "postgres", "test", "dev"))
    except PackageNotFoundError as error:
        pytest.skip(f"`make check` installs {error.name}, which tells what the dev extra brings")
    assert _pins().keys() - needed == set()


def _make_venv(folder: Path, python: Path | str) -> subprocess.CompletedProcess[str]:
    venv = folder / "venv"
    command = ["make", "-s", f"VENV={venv}", f"PYTHON={python}", f"{venv}/.stamp-venv"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_a_missing_python_is_named_in_one_line(tmp_path: Path) -> None:
    done = _make_venv(tmp_path, tmp_path / "no-python")
    assert done.returncode != 0
    assert "apt-get install python3 python3-venv" in done.stderr.splitlines()[0]


def test_a_missing_venv_module_is_named_in_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python-without-venv"  # as Debian's python3 is without python3-venv
    python.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = _make_venv(tmp_path, python)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].endswith(
        "has no venv module. On Debian and Ubuntu: apt-get install python3-venv"
    )


@pytest.mark.slow
def test_a_fresh_venv_is_made_once(tmp_path: Path) -> None:
    first = _make_venv(tmp_path, sys.executable)
    assert first.returncode == 0, first.stderr
    assert "Setting up" in first.stdout
    assert (tmp_path / "venv" / "bin" / "python").exists()
    again = _make_venv(tmp_path, sys.executable)
    assert (again.returncode, again.stdout) == (0, "")


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Built from what git tracks, without the network; data files (artifacts, templates, static) included."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    tracked = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    for name in tracked:
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-q", "-w"]
    subprocess.run([*command, str(tmp_path), str(tmp_path / "source")], check=True, capture_output=True, timeout=100)
    (wheel,) = tmp_path.glob("tessera_network-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {name.removeprefix("src/") for name in tracked if name.startswith("src/tessera/")}
    assert expected - held == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
