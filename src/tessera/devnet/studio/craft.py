"""One piece of work in a process of its own: a brief's inputs come in, the work goes out, with what it cost.

    python -m tessera.devnet.studio.craft KIND < inputs > work        the last line on standard error: cpu_ms=N

So what an agent reads from others is never parsed in the process that holds its key.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio

from tessera.core import encoding
from tessera.core.errors import Invalid, Late, TesseraError
from tessera.devnet.studio.analysis import analyse, check
from tessera.devnet.studio.charts import draw_charts
from tessera.devnet.studio.edit import cut
from tessera.devnet.studio.voice import speak

__all__ = ["CRAFTS", "do_work", "make"]

INPUT_LIMIT = 2**20  # bytes
WORK_LIMIT = 64 * 2**20
CRAFT_S = 240.0


def _charts(inputs: dict[str, Any]) -> bytes:
    return draw_charts(inputs["analysis"] if "analysis" in inputs else analyse(inputs["series"]))


def _voice(inputs: dict[str, Any]) -> bytes:
    return speak(inputs["analysis"] if "analysis" in inputs else analyse(inputs["series"]))


def _cut(inputs: dict[str, Any]) -> bytes:
    return cut(Path(inputs["charts"]).read_bytes(), Path(inputs["voice"]).read_bytes())


CRAFTS = {
    "analysis": lambda inputs: analyse(inputs["series"]),
    "check": lambda inputs: check(inputs["series"], inputs["sentences"]),
    "charts": _charts,
    "voice": _voice,
    "cut": _cut,
}


async def do_work(kind: str, inputs: dict[str, Any]) -> tuple[bytes, int]:
    """The work, and the processor time that it took, in milliseconds, rounded up.

    Raises: Invalid with the craft's last words when it cannot be done; Late.
    """
    command = [sys.executable, "-m", "tessera.devnet.studio.craft", kind]
    try:
        with anyio.fail_after(CRAFT_S):
            done = await anyio.run_process(command, input=encoding.encode(inputs), check=False, stderr=subprocess.PIPE)
    except TimeoutError as error:
        raise Late(f"{kind} has not ended after {CRAFT_S:g} s") from error
    words = done.stderr.decode(errors="replace").strip()
    cost = re.search(r"cpu_ms=(\d{1,9})\Z", words)
    if done.returncode != 0 or cost is None:
        raise Invalid(f"{kind} cannot be done: {words[-300:] or f'status {done.returncode}'}")
    if len(done.stdout) > WORK_LIMIT:
        raise Invalid(f"{kind} made {len(done.stdout)} bytes, at most {WORK_LIMIT} expected")
    return done.stdout, int(cost[1])


def make(kind: str, data: bytes) -> bytes:
    """The work itself, in this process. Raises: Invalid for inputs that the craft cannot use."""
    if kind not in CRAFTS:
        raise Invalid(f"a craft is one of {', '.join(CRAFTS)}, not {kind[:40]!r}")
    inputs = encoding.decode(data, INPUT_LIMIT)
    try:
        return CRAFTS[kind](inputs)
    except (KeyError, TypeError, OSError) as error:
        raise Invalid(f"the inputs of {kind} lack something: {error!r:.200}") from error


def _main() -> int:
    try:
        work = make(sys.argv[1], sys.stdin.buffer.read(INPUT_LIMIT + 1))
    except TesseraError as error:
        print(error.message, file=sys.stderr)  # noqa: T201  the caller reads it
        return 1
    sys.stdout.buffer.write(work)
    sys.stdout.buffer.flush()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(one.ru_utime + one.ru_stime for one in used)
    print(f"cpu_ms={int(cpu_s * 1_000) + 1}", file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
