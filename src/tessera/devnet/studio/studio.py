"""One production of the studio: a buyer orders a recap, the editor's cluster makes it, the money goes where it is due.

What people see is a `View`, made from the chain's own record of every job. A production that was interrupted goes on
from there at the next start.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import structlog

from tessera.agents.commerce.buyer import Buyer, Order, Progress
from tessera.agents.commerce.cluster import ClusterReport, Value
from tessera.agents.commerce.terms import Brief, Phase, phase_of
from tessera.agents.intents import intent_id
from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Refused, TesseraError
from tessera.devnet.studio.cast import ASSET, DECIMALS, MAKERS, PRICES, ROLES, StudioConfig
from tessera.devnet.studio.charts import need_pillow
from tessera.devnet.studio.company import Company, open_company
from tessera.devnet.studio.crew import STEP_S, Crew
from tessera.devnet.studio.series import LABEL, make_series
from tessera.devnet.studio.tools import need_programs
from tessera.training.home import write_atomic

__all__ = ["FILM", "Studio", "View", "productions"]

log = structlog.get_logger()
FILM = "recap.mp4"
RUNS = "productions.json"
JOBS_SHOWN = 60
RUNS_KEPT = 50
ALONE = ("analysis", "charts", "voice")


@dataclass(frozen=True)
class View:
    """One moment of the studio, ready for JSON. Money in units of `asset`."""

    phase: str = "opening"
    note: str = ""
    label: str = LABEL
    asset: str = ASSET
    decimals: int = DECIMALS
    chain_id: int = 0
    escrow: str = ""
    agents: tuple[dict[str, Any], ...] = ()
    jobs: tuple[dict[str, Any], ...] = ()
    cluster: dict[str, Any] = field(default_factory=dict)
    value: dict[str, int] = field(default_factory=dict)
    film: dict[str, Any] = field(default_factory=dict)
    held: int = 0  # by the escrow now
    urls: dict[str, str] = field(default_factory=dict)

    @property
    def adds_up(self) -> bool:
        """What the agents hold and what is in escrow is what they held at the beginning."""
        return sum(agent["change"] for agent in self.agents) + self.held == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"adds_up": self.adds_up}


class Studio:
    """Made once for each command.

    Args:
        changed: told after every change that people would want to see.
    """

    def __init__(self, config: StudioConfig, clock: Clock, changed: Callable[[View], None]) -> None:
        self.config, self._clock, self._tell = config, clock, changed
        self.view = View()
        self._cluster: ClusterReport | None = None
        self._facts: dict[str, Any] = {}
        self._company: Company | None = None

    @property
    def film(self) -> Path:
        return self.config.state_dir / FILM

    async def live(self) -> View:
        """One production, to its end. Raises: Invalid when a program is missing, before anything is paid."""
        need_programs()
        need_pillow()
        async with open_company(self.config, self._clock) as company:
            self._company = company
            run = _begin_run(company.home.path)
            crew = Crew(company, self.config, run, self._on_cluster)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(crew.live)
                tasks.start_soon(self._watch, company)
                self._say("working", "the buyer orders a recap")
                done = await self._order(company, run, "recap", {"series": make_series(self.config.seed)})
                await self._deliver(company, run, done)
                if self.config.compare and self._facts.get("film"):
                    await self._compare(company, crew, run)
                tasks.cancel_scope.cancel()
            self._say("done" if self._facts.get("film") else "failed", self._facts["end"])
            await self._look(company)
            _end_run(company.home.path, self.view)
        return self.view

    # --- buying -----------------------------------------------------------------------------------------------------

    async def _order(self, company: Company, run: str, kind: str, inputs: dict[str, Any]) -> tuple[Order, Progress]:
        """The buyer's order, to its end."""
        buyer, intent = company.buyer("buyer"), intent_id("studio", run, "buyer", kind)
        asked = buyer.asked(intent)
        deadline = asked.deadline if asked else int(self._clock.time()) + self.config.deadline_s
        order = Order(
            intent, company.mandates["buyer"].id, company.account(MAKERS[kind][-1]), company.account("referee"),
            company.amount(PRICES[kind]), deadline, _TITLES[kind], Brief(kind, _TITLES[kind], inputs), purpose="recap",
        )  # fmt: skip
        while not (progress := await _look_again(buyer, order)).is_over:
            await anyio.sleep(STEP_S)
        return order, progress

    async def _deliver(self, company: Company, run: str, done: tuple[Order, Progress]) -> None:
        order, progress = done
        if progress.outcome is None or progress.outcome.paid == 0:
            self._facts["end"] = "no film: the buyer has its money back"
            return
        film = await company.buyer("buyer").collect(order)
        write_atomic(self.film, film)
        seconds = await anyio.to_thread.run_sync(_seconds, self.film)
        self._facts["film"] = {"file": str(self.film), "bytes": len(film), "seconds": seconds, "job": progress.job}
        self._facts["income"] = progress.outcome.paid
        self._facts["end"] = "the film is delivered and paid"

    async def _compare(self, company: Company, crew: Crew, run: str) -> None:
        """The same buyer buys of the same agents what each can make by itself."""
        self._say("comparing", "the same agents, one by one")
        together_ms = sum(crew.meter.together_ms.values())
        crew.meter.alone, income_alone = True, 0
        for kind in ALONE:
            _, progress = await self._order(company, f"{run} alone", kind, {"series": make_series(self.config.seed)})
            income_alone += progress.outcome.paid if progress.outcome else 0
        value = Value(
            self._facts["income"], self._cost_up(together_ms), income_alone,
            self._cost_up(sum(crew.meter.alone_ms.values())),
        )  # fmt: skip
        self._facts["value"] = value.to_dict()

    def _cost_up(self, cpu_ms: int) -> int:
        return -(-cpu_ms * self.config.cpu_units_per_s // 1_000)

    async def lookup(self, kind: str, name: str) -> dict[str, Any] | None:
        """What the chain says about a transaction or an account, for the page; None for nothing."""
        company = self._company
        if company is None:
            return None
        if kind == "account":
            role = next((role for role in ROLES if company.account(role) == name), None)
            return None if role is None else await _agent(company, role)
        receipt = await company.ledger.chain.receipt(name)
        if receipt is None:
            return None
        facts = {
            "block": receipt.block_number,
            "from": receipt.sender,
            "gas": receipt.gas_used,
            "events": len(receipt.logs),
        }
        return facts | {"jobs": [job for job in self.view.jobs if name in job["proofs"].values()]}

    # --- showing ----------------------------------------------------------------------------------------------------

    def _say(self, phase: str, note: str) -> None:
        log.info("studio_phase", phase=phase, note=note)
        self._facts |= {"phase": phase, "note": note}

    def _on_cluster(self, report: ClusterReport) -> None:
        self._cluster = report

    async def _watch(self, company: Company) -> None:
        while True:
            try:
                await self._look(company)
            except TesseraError as error:
                log.warning("studio_not_seen", code=error.code, reason=error.message)
            await anyio.sleep(2 * STEP_S)

    async def _look(self, company: Company) -> None:
        await company.index.update()
        await company.registry.refresh()
        agents = [await _agent(company, role) for role in ROLES]
        jobs = [_job(company, job) for job in company.view.jobs(limit=JOBS_SHOWN)]
        held = (await company.jobs.balance(company.jobs.address)).units
        view = View(
            phase=self._facts.get("phase", "opening"), note=self._facts.get("note", ""),
            chain_id=company.ledger.chain_id, escrow=company.jobs.address, agents=tuple(agents), jobs=tuple(jobs),
            cluster=self._cluster.to_dict() if self._cluster else {}, value=self._facts.get("value", {}),
            film=self._facts.get("film", {}), held=held - company.held_before, urls=self.view.urls,
        )  # fmt: skip
        if view != self.view:
            self.view = view
            self._tell(view)


_TITLES = {
    "recap": "Market recap as a video", "analysis": "Facts of the month", "charts": "Pictures of the scenes",
    "voice": "Narration of the scenes",
}  # fmt: skip


async def _look_again(buyer: Buyer, order: Order) -> Progress:
    try:
        return await buyer.advance(order)
    except (Invalid, Refused):
        raise
    except TesseraError as error:
        log.info("order_not_seen", code=error.code, reason=error.message)
        return Progress(Phase.REQUEST)


async def _agent(company: Company, role: str) -> dict[str, Any]:
    account, mandate = company.account(role), company.mandates.get(role)
    balance = (await company.jobs.balance(account)).units
    earned = company.view.earned(account)
    found = company.registry.found(company.numbers[role]) if role in company.numbers else None
    funded, refunded = company.view.spent(account)
    return {
        "role": role, "account": account, "balance": balance, "change": balance - company.opening[role],
        "earned": earned.amount, "funded": funded.amount, "refunded": refunded.amount,
        "votes": found.votes if found else 0, "stars": round(found.mean, 1) if found else 0.0,
        "mandate": "" if mandate is None else mandate.id,
        "cap": 0 if mandate is None else mandate.per_period.units,
        "counted": 0 if mandate is None else company.books.spent(mandate.id).units,
    }  # fmt: skip


def _job(company: Company, job: Any) -> dict[str, Any]:
    """A row, from the chain's record."""
    provider = "" if job.provider is None else company.role_of(job.provider)
    phase = phase_of(job.status, True).name.lower()
    return {
        "id": job.id, "title": job.description.split("\n")[0], "client": company.role_of(job.client),
        "provider": provider, "evaluator": company.role_of(job.evaluator), "phase": phase,
        "price": job.budget, "paid": job.paid, "refunded": job.refunded, "deliverable": job.deliverable,
        "proofs": dict(job.proofs),
    }  # fmt: skip


def _seconds(film: Path) -> float:
    from tessera.devnet.studio.tools import run_program

    words = ["ffprobe", "-v", "error", "-show_entries", "format=duration", "-of", "csv=p=0", str(film)]
    return round(float(run_program(words, timeout_s=30)), 1)


def productions(folder: Path) -> list[dict[str, Any]]:
    """The reports of what was produced here, the oldest first. Raises: Invalid for a damaged file."""
    return list(_read_runs(folder)["done"])


def _begin_run(folder: Path) -> str:
    """The number of the production that is open, or of a new one."""
    runs = _read_runs(folder)
    number = runs["last"] if runs["open"] else runs["last"] + 1
    write_atomic(folder / RUNS, json.dumps({**runs, "last": number, "open": True}).encode())
    return str(number)


def _end_run(folder: Path, view: View) -> None:
    runs = _read_runs(folder)
    done = [*runs["done"], {"number": runs["last"], **view.to_dict()}][-RUNS_KEPT:]
    write_atomic(folder / RUNS, json.dumps({"last": runs["last"], "open": False, "done": done}).encode())


def _read_runs(folder: Path) -> dict[str, Any]:
    file = folder / RUNS
    if not file.exists():
        return {"last": 0, "open": False, "done": []}
    try:
        runs = json.loads(file.read_bytes())
        return {"last": int(runs["last"]), "open": bool(runs["open"]), "done": list(runs["done"])}
    except (ValueError, KeyError, TypeError) as error:
        raise Invalid(f"{file} is damaged: restore it, or move it away") from error
