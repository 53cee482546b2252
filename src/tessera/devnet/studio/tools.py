"""The programs outside Python that the studio needs, and how they are run: with a deadline, never through a shell."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from tessera.core.errors import Invalid, Late

__all__ = ["need_programs", "run_program"]

PACKAGES = {"ffmpeg": "ffmpeg", "ffprobe": "ffmpeg", "espeak-ng": "espeak-ng"}  # what Debian's packages bring
PROGRAM_S = 180.0


def need_programs(names: Sequence[str] = tuple(PACKAGES)) -> None:
    """Raises: Invalid with what to install."""
    missing = sorted({PACKAGES[name] for name in names if shutil.which(name) is None})
    if missing:
        words = " and ".join(missing)
        raise Invalid(f"the studio needs {words}: on Debian and Ubuntu, apt-get install {' '.join(missing)}")


def run_program(words: Sequence[str], given: bytes = b"", *, timeout_s: float = PROGRAM_S) -> bytes:
    """What a program writes to standard output. Raises: Invalid with its last words when it fails; Late."""
    need_programs([words[0]])
    try:
        done = subprocess.run(list(words), input=given, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise Late(f"{words[0]} has not ended after {timeout_s:g} s") from error
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip()[-300:]
        raise Invalid(f"{words[0]} failed with status {done.returncode}: {last}")
    return done.stdout
