"""The devnet's own workers: ordinary `tessera join` processes with their own state, started again when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import structlog
from anyio import to_thread

from tessera.core.errors import Unavailable
from tessera.training.files import keep_short

__all__ = ["WorkerProcesses"]

log = structlog.get_logger()

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
EARLY_DEATHS = 4  # in a row: then something is wrong that starting again does not mend
HEALTHY_S = 30.0  # a process that lived this long starts again without a pause
STOP_S = 5.0
LOG_LOOK_S = 30.0
LOG_BYTES = 5_000_000
ALONE = ("--yes", "--probe-seconds", "0", "--until-stdin-closes")  # nobody is there to be asked


class WorkerProcesses:
    """`count` workers under `folder`, one state directory each, their output in a log file beside it."""

    def __init__(self, invitation: str, folder: Path, count: int) -> None:
        self._invitation, self._folder, self._count = invitation, folder, count

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep all of them alive inside the block; stop them, and wait, at its end."""
        async with anyio.create_task_group() as tasks:
            for number in range(self._count):
                tasks.start_soon(self._keep_alive, number)
                tasks.start_soon(self._keep_log_short, number)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()

    async def _keep_alive(self, number: int) -> None:
        pause_s, early_deaths = FIRST_PAUSE_S, 0
        while True:
            started = anyio.current_time()
            code = await self._run_once(number)
            lived_s = anyio.current_time() - started
            if code == 0:
                return  # the run was closed
            log.warning("worker_died", worker=number, code=code, log=str(self._log_file(number)))
            early_deaths = 0 if lived_s > HEALTHY_S else early_deaths + 1
            if early_deaths >= EARLY_DEATHS:
                raise Unavailable(f"worker {number} died {EARLY_DEATHS} times at its start: {self._last_words(number)}")
            pause_s = FIRST_PAUSE_S if early_deaths == 0 else min(2 * pause_s, LONGEST_PAUSE_S)
            await anyio.sleep(pause_s)

    async def _keep_log_short(self, number: int) -> None:
        while True:
            await anyio.sleep(LOG_LOOK_S)
            await to_thread.run_sync(keep_short, self._log_file(number), LOG_BYTES)

    async def _run_once(self, number: int) -> int:
        state = self._folder / f"worker-{number}"
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tessera", "join", self._invitation, "--state-dir", str(state), *ALONE]
        with self._log_file(number).open("ab") as output:
            process = await anyio.open_process(
                command,
                stdin=subprocess.PIPE,  # held open and never written: it closes when we die, even by SIGKILL
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for the parent, which stops us in order
            )
        try:
            return await process.wait()
        finally:
            with anyio.CancelScope(shield=True):
                await _stop(process)

    def _environment(self) -> dict[str, str]:
        """One thread for each process: they share the machine's cores. What the owner has set for a worker of his own,
        hours for one, is not for these."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TESSERA_JOIN_")}
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**kept, **threads, "TESSERA_CONFIG_DIR": str(self._folder)}

    def _last_words(self, number: int) -> str:
        lines = self._log_file(number).read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it wrote nothing"

    def _log_file(self, number: int) -> Path:
        return self._folder / f"worker-{number}.log"


async def _stop(process: anyio.abc.Process) -> None:
    """SIGTERM, a little patience, SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        process.send_signal(sign)
        with anyio.move_on_after(STOP_S):
            await process.wait()
