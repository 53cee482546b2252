"""The whole economy on one machine, from the first block to a table that adds up; what `tessera up` runs.

Phases: starting (chain, coin, text) → seating → training → serving → closed. Everything that must last lies in the
state directory, so an economy that was stopped anywhere goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import anyio
import structlog

from tessera.core.clock import Clock
from tessera.core.errors import Conflict, TesseraError
from tessera.devnet.front import Asgi, Front
from tessera.devnet.http import bind_ports
from tessera.devnet.market import gateway, sell
from tessera.devnet.opening import open_doors, open_run_here
from tessera.devnet.plan import UpConfig
from tessera.devnet.run import Run
from tessera.devnet.snapshot import Phase
from tessera.training.home import Home
from tessera.training.wishes import read_wish

__all__ = ["Economy"]

log = structlog.get_logger()

POLL_S = 0.25
BOOKS_S = 1.0  # how often an open economy looks for new income
SETTLE_S = 120.0  # how long a closing one waits for everybody's claims


class Economy:
    """Drives the phases; what people may see of it is in its attributes.

    Args:
        page: builds the page's ASGI app for this economy.
        changed: told after every change that people would want to see.
    """

    def __init__(
        self,
        config: UpConfig,
        clock: Clock,
        page: Callable[[Economy], Asgi],
        changed: Callable[[Economy], None],
    ) -> None:
        self.config, self._clock, self._changed = config, clock, changed
        self._front = Front(page(self))
        self.started = time.monotonic()
        self.phase: Phase = "starting"
        self.note = ""
        self.urls: dict[str, str] = {}
        self.run: Run | None = None
        self._life = anyio.CancelScope()  # ends when the host is wished to close
        self.settled = False  # the first round of income has been spread and claimed

    async def live(self) -> None:
        """Everything, in order. With `once` it returns when the table adds up; else it goes on until cancelled."""
        config = self.config
        home = Home(config.state_dir)
        async with AsyncExitStack() as stack:
            stack.enter_context(home.locked())
            sockets = stack.enter_context(bind_ports(config.host, config.port))
            doors = open_doors(config, home, sockets, self._front, self._clock)
            ledger, self.urls = await stack.enter_async_context(doors)
            opening = open_run_here(config, home, ledger, self._clock, lambda note: self._enter("starting", note))
            run = self.run = await stack.enter_async_context(opening)
            if read_wish(run.folder) == "close":
                raise Conflict(f"run {run.manifest.run_id[:16]}… is closed: `tessera run resume` opens it again")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._follow_wishes, run)
                with self._life:
                    await self._seat(run)
                    stack.callback(run.books.close)
                    await self._train(run)
                    async with gateway(run, self._front, self.urls["page"].rstrip("/"), self._clock):
                        await self._serve(run)
                        await self._settle(run)
                        if not config.once:
                            await self._stay_open(run)
                tasks.cancel_scope.cancel()
            self._enter("closed")
            await run.host.close()

    async def _follow_wishes(self, run: Run) -> None:
        """`tessera run pause`, `resume` and `close`, from any other process."""
        while True:
            run.paused = (wish := read_wish(run.folder)) == "pause"
            if wish == "close":
                log.info("close_wished")
                self._life.cancel()
            await anyio.sleep(POLL_S)

    async def _seat(self, run: Run) -> None:
        note = f"{run.open_seats} seats are open; join with the invitation" if run.open_seats else "own workers come"
        self._enter("seating", note)
        run.seat(await run.host.seat_everyone())

    async def _train(self, run: Run) -> None:
        """Wait until every stage is trained and every epoch is on the chain and redeemed."""
        self._enter("training")
        while not (run.board.everyone("trained") and run.board.everyone("settled")):
            paused = run.paused and not run.board.everyone("trained")
            if paused != (run.host.phase == "paused"):
                run.host.phase = "paused" if paused else "training"
                self._enter("training", "paused; `tessera run resume` goes on" if paused else "")
            await self._look(run)
            await anyio.sleep(POLL_S)

    async def _serve(self, run: Run) -> None:
        self._enter("serving", "the first buyer asks")
        run.host.phase = "serving"
        if self.config.requests and run.manifest.price_units:
            await sell(run, self.urls["page"].rstrip("/"), self.config.requests, partial(self._look, run))

    async def _settle(self, run: Run) -> None:
        """Spread what came in, and wait until everybody has his part; the workers claim their own."""
        self._enter("serving", "spreading the income")
        deadline = time.monotonic() + SETTLE_S
        while True:
            fresh = await self._move_money(run)
            income = run.figures.income
            if fresh and income.unclaimed == 0 and income.undistributed == run.figures.at_split == 0:
                break
            if time.monotonic() > deadline:
                log.warning("income_unclaimed", units=str(income.unclaimed), seconds=SETTLE_S)
                break
            await anyio.sleep(POLL_S)
        self.settled = True
        self._enter("serving", "some income waits in the contract" if income.unclaimed else "every part is claimed")

    async def _stay_open(self, run: Run) -> None:
        """Serve until cancelled; income that arrives is spread as it comes."""
        self._enter("serving", "open until Ctrl-C; starting again goes on from there")
        while True:
            await self._look(run)
            if run.figures.income.undistributed or run.figures.income.unclaimed or run.figures.at_split:
                await self._move_money(run)
            await anyio.sleep(BOOKS_S)

    async def _move_money(self, run: Run) -> bool:
        """Anyone may do this; the economy does it for who runs no process: owners, and workers who have left.

        True when the books are fresh.
        """
        await self._look(run)
        try:
            await run.books.distribute(run.people.operator)
            for account in run.absent:
                await run.books.pay_out(account, run.people.operator)
        except TesseraError as error:  # the chain is away, or somebody was first: the money waits in the contract
            log.warning("money_not_moved", code=error.code, reason=error.message)
        return await self._look(run)

    async def _look(self, run: Run) -> bool:
        """Read the books and tell the views. A chain or worker that is away costs fresh figures, nothing else."""
        fresh = True
        run.follow()
        try:
            await run.books.refresh()
        except TesseraError as error:
            log.warning("books_not_refreshed", code=error.code, reason=error.message)
            fresh = False
        self._changed(self)
        return fresh

    def _enter(self, phase: Phase, note: str = "") -> None:
        log.info("phase", phase=phase, note=note)
        self.phase, self.note = phase, note
        self._changed(self)
