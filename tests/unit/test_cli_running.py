"""A command that was started by another process ends with it, however that one went."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

PROGRAM = """
import anyio
from tessera.cli.running import run_until_signal

async def work():
    print("up", flush=True)
    try:
        await anyio.sleep_forever()
    finally:
        print("down", flush=True)

run_until_signal(work, until_stdin_closes=True)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        yield process
        process.kill()


def test_it_ends_in_order_when_its_standard_input_closes(child: subprocess.Popen[bytes]) -> None:
    output, _ = child.communicate(timeout=20)
    assert (child.returncode, output) == (0, b"down\n")


def test_what_is_written_there_ends_nothing(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin
    child.stdin.write(b"x" * 10_000)
    child.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    output, _ = child.communicate(timeout=20)
    assert (child.returncode, output) == (0, b"down\n")
