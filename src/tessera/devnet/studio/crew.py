"""The studio's agents at work: what each sells and how it is made; the editor hires the others as a cluster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog

from tessera.agents.commerce.buyer import Order
from tessera.agents.commerce.cards import STARS
from tessera.agents.commerce.cluster import MOST_CANDIDATES, Cluster, ClusterReport, Part, Plan
from tessera.agents.commerce.evaluator import Evaluator
from tessera.agents.commerce.seller import Seller, Service, Shelf, Worker
from tessera.agents.commerce.terms import Brief
from tessera.agents.intents import intent_id
from tessera.core import encoding
from tessera.core.errors import Conflict, Invalid, Refused
from tessera.core.hashing import sha256
from tessera.devnet.studio.analysis import SCENES, read_analysis
from tessera.devnet.studio.archives import write_archive
from tessera.devnet.studio.cast import MAKERS, PRICES, StudioConfig
from tessera.devnet.studio.company import Company
from tessera.devnet.studio.craft import do_work
from tessera.devnet.studio.judges import JUDGES
from tessera.devnet.studio.voice import read_voice

__all__ = ["Crew", "Meter"]

log = structlog.get_logger()

STEP_S = 0.15
PART_S = 300  # for one part, on a busy machine


@dataclass
class Meter:
    """What work has cost, in milliseconds of processor time: together in the cluster, and of each agent alone."""

    alone: bool = False
    together_ms: dict[str, int] = field(default_factory=dict)
    alone_ms: dict[str, int] = field(default_factory=dict)

    def record(self, kind: str, cpu_ms: int) -> None:
        book = self.alone_ms if self.alone else self.together_ms
        book[kind] = book.get(kind, 0) + cpu_ms


class Crew:
    """All agents of one company.

    Args:
        run: a name for this production; the same name goes on with the same jobs.
        changed: told when the cluster has moved.
    """

    def __init__(
        self, company: Company, config: StudioConfig, run: str, changed: Callable[[ClusterReport], None]
    ) -> None:
        self._company, self._config, self._run, self._changed = company, config, run, changed
        self.meter = Meter()
        self.sellers = {role: self._seller(role) for roles in MAKERS.values() for role in roles}
        self.referee = Evaluator(
            company.keys["referee"], company.jobs, company.desks["referee"], company.street, JUDGES, clock=company.clock
        )

    async def live(self) -> None:
        """Until cancelled."""
        async with anyio.create_task_group() as tasks:
            for role, seller in self.sellers.items():
                if not (self._config.fault == "absent" and role == "narrator"):
                    tasks.start_soon(_again, seller.step)
            tasks.start_soon(_again, self.referee.step)

    def _seller(self, role: str) -> Seller:
        company = self._company
        kinds = [kind for kind, roles in MAKERS.items() if role in roles]
        services = {kind: Service(PRICES[kind], self._worker(role, kind)) for kind in kinds}
        shelf = Shelf(company.home.path / "works" / role.replace(" ", "-"))
        seller = Seller(
            company.keys[role], company.jobs, company.desks[role], company.street, shelf, services,
            evaluators=frozenset({company.account("referee")}), clock=company.clock,
        )  # fmt: skip
        if not (self._config.fault == "absent" and role == "narrator"):
            company.street.move_in(company.desks[role], seller)
        else:
            company.street.away.add(company.account(role))
        return seller

    def _worker(self, role: str, kind: str) -> Worker:
        if kind == "recap":
            return self._recap
        if kind == "voice":
            return lambda brief: self._voice(role, brief)
        return self._craft

    # --- work -------------------------------------------------------------------------------------------------------

    async def _craft(self, brief: Brief) -> bytes:
        work, cpu_ms = await do_work(brief.kind, brief.inputs)
        self.meter.record(brief.kind, cpu_ms)
        return work

    async def _voice(self, role: str, brief: Brief) -> bytes:
        """Speak, and have the analyst check what is said: the narrator hires, too, under a child of the mandate."""
        fault = self._config.fault if role == "narrator" else "none"
        if fault == "dead":
            await anyio.sleep_forever()
        work = await self._craft(brief)
        if fault == "silent":
            return _silenced(work)
        _, spoken, _ = read_voice(work)
        sentences = {name: " ".join(text for _, text in spoken[name]) for name in SCENES}
        series = brief.inputs.get("series")
        if series is None:
            facts = read_analysis(brief.inputs["analysis"])
            series = {"days": facts["days"], "cents": facts["cents"]}
        verdict = encoding.decode(await self._checked(role, {"series": series, "sentences": sentences}), 4_096)
        if verdict["wrong"]:
            raise Refused(f"the analyst does not agree with {verdict['wrong']}", rule="check")
        return work

    async def _checked(self, role: str, inputs: dict[str, Any]) -> bytes:
        company, mode = self._company, "alone" if self.meter.alone else "cluster"
        buyer, intent = company.buyer(role), intent_id("studio", self._run, mode, role, "check")
        asked = buyer.asked(intent)
        deadline = asked.deadline if asked else int(company.clock.time()) + PART_S
        order = Order(
            intent, company.mandates[role].id, company.account("analyst"), company.account("referee"),
            company.amount(PRICES["check"]), deadline, "Check of the words",
            Brief("check", "Do these sentences follow from the prices?", inputs), purpose="recap",
        )  # fmt: skip
        while not (progress := await buyer.advance(order)).is_over:
            await anyio.sleep(STEP_S)
        if progress.outcome is None or progress.outcome.paid == 0:
            raise Refused("the check did not come", rule="check")
        return await buyer.collect(order)

    async def _recap(self, brief: Brief) -> bytes:
        """The editor: hire the others, then cut."""
        company = self._company
        await company.registry.refresh()
        cluster = Cluster(self.plan(brief), company.buyer("editor"), clock=company.clock, changed=self._changed)
        report = await cluster.run()
        await self._rate(report)
        if not report.done:
            raise Refused("the cluster came to no film: every job that was not done is refunded", rule="cluster")
        folder = company.home.path / "works" / "cutting-room"
        await anyio.Path(folder).mkdir(parents=True, exist_ok=True)
        paths = {}
        for name in ("charts", "voice"):
            work = cluster.works[name]
            path = folder / f"{sha256(work).hex()}.zip"
            await anyio.Path(path).write_bytes(work)
            paths[name] = str(path)
        film, cpu_ms = await do_work("cut", paths)
        self.meter.record("cut", cpu_ms)
        return film

    async def _rate(self, report: ClusterReport) -> None:
        """The editor says of each paid job that it was done: what the next production's search goes by."""
        company = self._company
        for attempt in report.attempts:
            number = company.numbers.get(company.role_of(attempt.provider))
            if attempt.paid and number is not None:
                try:
                    await company.registry.rate(company.keys["editor"], number, attempt.progress.job, STARS)
                except Conflict:  # it has voted, before a crash
                    log.info("job_has_voted", job=attempt.progress.job)

    def plan(self, brief: Brief) -> Plan:
        """Analysis first; charts and narration from it, at the same time. The registry says by whom."""
        company = self._company
        made = {"evaluator": company.account("referee"), "within_s": PART_S}
        faulty = self._config.fault != "none"

        def part(name: str, title: str, text: str, **more: Any) -> Part:
            found = company.registry.search(name, most=PRICES[name])[:MOST_CANDIDATES]
            candidates = tuple(one.card.account for one in found)
            return Part(name=name, kind=name, title=title, text=text, candidates=candidates, price=PRICES[name],
                        **{**made, **more})  # fmt: skip

        series = brief.inputs.get("series")
        if not isinstance(series, dict):
            raise Invalid("a recap needs a series")
        patience = self._config.patience_s if faulty else PART_S
        parts = (
            part("analysis", "Facts of the month", "What happened?", inputs={"series": series}),
            part("charts", "Pictures of the scenes", "Draw the scenes.", after=("analysis",)),
            part("voice", "Narration of the scenes", "Speak the scenes.", after=("analysis",), within_s=patience),
        )
        budget = sum(PRICES[name] for name in ("analysis", "charts", "voice"))
        deadline = int(company.clock.time()) + self._config.deadline_s - 60
        mandate = company.mandates["editor"].id
        return Plan(f"studio {self._run}", mandate, parts, company.amount(budget), deadline, purpose="recap")


def _silenced(work: bytes) -> bytes:
    """The same narration without a sound: what a seller delivers who hopes that nobody listens."""
    from tessera.devnet.studio.archives import read_archive

    entries = read_archive(work)
    quiet = {
        name: data[:44] + bytes(len(data) - 44) if name.endswith(".wav") else data for name, data in entries.items()
    }
    return write_archive(quiet)


async def _again(step: Callable[[], Awaitable[None]]) -> None:
    while True:
        await step()
        await anyio.sleep(STEP_S)
