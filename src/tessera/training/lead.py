"""The lead: one worker of stage 0 who says which worker serves which microbatch, and when a step is over.

    assemble ─▶ begin (a term) ─▶ step: take … done ─▶ [prepare … prepared] ─▶ commit ─▶ step …

He has no power over pay: receipts come from neighbours, shares from everybody's votes. When he is gone, the next worker
of stage 0 leads: a new term begins with the open step, and what was computed of it is computed again.

How nothing is lost: a step is committed only when every microbatch is in the sums of each worker on its path and, where
a stage has several workers, when each of them holds the sums of all. So from the first commit of a step on, everybody
can commit it, whoever dies; and before, nobody has moved. A worker who dies costs his microbatches of the open step,
which others of his stage compute again from their neighbours' codes. When a stage has nobody else, the lead waits for
one, and all go back to the newest checkpoint that every stage has.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from tessera.core.errors import Misbehaviour, Unavailable
from tessera.core.ids import PeerId
from tessera.models.memory import in_flight_depth
from tessera.training.control import Message
from tessera.training.crew import Crew, Member, read_state
from tessera.training.deadlines import Deadline
from tessera.training.manifest import Manifest
from tessera.training.plan import Order, StepPlan
from tessera.training.protocols import QUIET_S, WORK_S
from tessera.training.routing import Router

__all__ = ["Lead", "LeadEvents", "StepLost"]

log = structlog.get_logger()

GRACE_S = 2.0  # after the run could begin: how long the others may take to arrive
AGAIN_S = 1.0  # after a term that ended
TICK_S = 0.5  # between two looks at who holds the others up
LINK_RETRY_S = 0.5  # after a link broke
LINK_TRIES = 3  # before the lower worker is left out, if his stage has another
LEFT_OUT_S = 30.0
PREPARE_TRIES = 3
KEPT = 15  # checkpoints that a worker is believed to hold; one that is gone costs a question


class StepLost(Unavailable):
    """A stage has no worker left: the term is over."""


class LeadEvents(Protocol):
    """What the lead's own worker shows to people. Called from the event loop; must be quick."""

    def leading(self, trouble: str) -> None: ...
    def validated(self, steps: int, loss: float) -> None: ...


class Lead:
    """Leads `manifest`'s run in the terms that `next_term` gives. `run` never returns; it raises when another leads.

    Args:
        majority: whether these workers are enough for nobody else to be able to lead.
        exact: workers of one stage exchange their gradients in every step.
        refresh: look for newer seats and addresses.
    """

    def __init__(
        self,
        manifest: Manifest,
        crew: Crew,
        *,
        majority: Callable[[set[PeerId]], bool],
        events: LeadEvents,
        now: Callable[[], float],
        next_term: Callable[[], int],
        refresh: Callable[[], Awaitable[None]],
        validation_count: int,
        exact: bool = True,
        drop_late: bool = False,
    ) -> None:
        self._manifest, self._crew, self._majority, self._events = manifest, crew, majority, events
        self._now, self._next_term, self._refresh = now, next_term, refresh
        self._windows, self._exact, self._drop_late = validation_count, exact, drop_late
        self._stages = range(manifest.model.stages)
        self._router = Router()
        self._pace = {stage: Deadline(floor_s=5.0, cap_s=QUIET_S) for stage in self._stages}
        self._step_pace = Deadline(floor_s=5.0, cap_s=QUIET_S)
        self._last_done: dict[PeerId, float] = {}
        self._broken: dict[tuple[PeerId, PeerId], tuple[int, float]] = {}  # pair -> tries, when to try again
        self._plan: StepPlan | None = None
        self._losses: dict[int, float] = {}
        self.term, self.step, self.past = 0, 0, 0
        self.trained = False
        self._active = False

    async def run(self) -> None:
        """Lead. Raises `Unavailable` when a worker follows somebody else."""
        while True:
            try:
                await self._assemble()
                await self._begin()
                await self._train()
                await self._stay()
            except StepLost as error:
                log.info("term_over", term=self.term, step=self.step, reason=error.message)
                self._events.leading(error.message)
                self._plan, self._active = None, False
                await self._rest(AGAIN_S)

    async def _rest(self, seconds: float) -> None:
        """Hear what the workers say meanwhile: that a stage has been restored, for one. Else nobody would, where all
        are here and the next term begins at once."""
        until = self._now() + seconds
        while (left := until - self._now()) > 0:
            await self._hear(left)

    # --- beginning --------------------------------------------------------------------------------------------------

    async def _assemble(self) -> None:
        """Wait until every stage has a worker here, and enough of all; then a little for the others."""
        ready_since: float | None = None
        while True:
            missing = [s for s in self._stages if not any(m.standing != "away" for m in self._crew.of_stage(s))]
            here = {m.peer for m in self._crew.present()}
            everybody = len(here) == len(self._crew.members)
            if missing or not self._majority(here):
                ready_since = None
                self._events.leading(f"waiting for stage {missing[0]}" if missing else "waiting for more workers")
            elif ready_since is None:
                ready_since = self._now()
            if ready_since is not None and (everybody or self._now() - ready_since >= GRACE_S):
                return
            await self._hear(TICK_S if ready_since is None else GRACE_S / 4)
            if missing:
                await self._refresh()

    async def _begin(self) -> None:
        """Open a term: with the step that is open everywhere, or with the newest common checkpoint."""
        self.term = self._next_term()
        step = self._open_everywhere()
        if step is None:
            step = await self._load_common()
        self.step, self._active = step, True
        self._broken.clear()
        for member in self._crew.present():
            if member.step == step and member.past == self.past:
                self._open(member)
            else:
                self._sync(member)
        log.info("term_begins", term=self.term, step=step, workers=len(self._ready()))

    def _open(self, member: Member) -> None:
        jump = not self._exact and member.standing == "behind" and member.step != self.step
        member.standing, member.step, member.past = "ready", self.step, self.past
        member.say({"op": "open", "term": self.term, "step": self.step, "jump": jump})
        if self.trained:
            member.say({"op": "trained", "step": self.step})
        self._tell_who_is_alone(member.stage)

    def _tell_who_is_alone(self, stage: int) -> None:
        """Who is not alone may leave without taking the stage along."""
        ready = [m for m in self._crew.of_stage(stage) if m.standing == "ready"]
        for member in ready:
            member.say({"op": "alone", "alone": len(ready) == 1})

    def _open_everywhere(self) -> int | None:
        """The step that every stage has open. Whoever has not heard the last commit hears it now."""
        warm = [(m.step, m.past) for m in self._crew.present() if m.step is not None]
        if not warm:
            return None
        newest, past = max(warm)
        for stage in self._stages:
            if not any(m.past == past and m.step in (newest, newest - 1) for m in self._crew.of_stage(stage)):
                return None
        self.past = past
        for member in self._crew.present():
            if (member.step, member.past) == (newest - 1, past):
                said = {"op": "commit", "term": self.term, "step": newest - 1, "attempt": 0, "loss": None}
                member.say({**said, "owners": None, "mates": [member.peer]})
                member.step = newest
        return newest

    async def _load_common(self) -> int:
        """Have every stage load the newest checkpoint that all stages hold."""
        while True:
            held = [{c for m in self._crew.of_stage(s) for c in m.checkpoints if m.line} for s in self._stages]
            common = set.intersection(*held)
            if not common:
                for member in self._crew.present():
                    if not held[member.stage]:
                        member.say({"op": "restore"})
                raise StepLost("the workers hold no common checkpoint")
            step, self.past = max(common), self.term
            waiting = {m.peer for m in self._crew.present() if step in m.checkpoints}
            for member in self._crew.present():
                member.step = None
                if member.peer in waiting:
                    member.say({"op": "load", "step": step, "past": self.past})
            deadline = self._now() + WORK_S
            while waiting and self._now() < deadline:
                heard = await self._hear(deadline - self._now())
                if heard is None:
                    break
                member, message = heard
                if message["op"] == "gone":
                    waiting.discard(member.peer)
                elif message["op"] == "loaded":
                    waiting.discard(member.peer)
                    member.checkpoints = [c for c in member.checkpoints if c != step or message.get("step") == step]
                    if message.get("step") == step:
                        member.step, member.past = step, self.past
            if all(any(m.step == step for m in self._crew.of_stage(s)) for s in self._stages):
                return step
            if any(not any(m.line for m in self._crew.of_stage(s)) for s in self._stages):
                raise StepLost("a stage went away while the others loaded")

    # --- training ---------------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        schedule = self._manifest.schedule
        evaluated = -1
        while True:
            await self._everybody_works()
            if self._evaluation_due() and evaluated != self.step:
                await self._evaluate()
                evaluated = self.step
            elif self.step < schedule.steps:
                await self._train_step()
            else:
                break
        self._crew.say_all({"op": "trained", "step": self.step}, ("ready",))
        self.trained = True

    async def _stay(self) -> None:
        """Trained: help those who come later to the parameters."""
        while True:
            await self._hear(QUIET_S)

    async def _everybody_works(self) -> None:
        """Let those in who are in step, and wait while a stage has nobody who may work."""
        told = ""
        while True:
            while (heard := self._crew.hear_nowait()) is not None:
                self._take_in(*heard)
            now = self._now()
            idle = [s for s in self._stages if not any(m.works(now) for m in self._crew.of_stage(s))]
            if not idle:
                self._events.leading("")
                return
            if not any(m.standing == "ready" for m in self._crew.of_stage(idle[0])):
                raise StepLost(f"stage {idle[0]} has no worker")
            why = next((m.rests for m in self._crew.of_stage(idle[0]) if m.rests), "it was too slow")
            if why != told:
                self._events.leading(f"stage {idle[0]} pauses: {why}")
                told = why
            await self._hear(TICK_S)

    async def _train_step(self) -> None:
        now, count = self._now(), self._manifest.schedule.microbatches
        workers = [[m.peer for m in self._crew.of_stage(s) if m.works(now)] for s in self._stages]
        self._plan = plan = StepPlan(count, workers, self._router, in_flight_depth(count))
        self._losses = {}
        begun, attempt = now, 0
        self._last_done = {peer: now for stage in workers for peer in stage}
        self._give(plan.feed(now))
        while True:
            while not plan.complete:
                await self._hear(TICK_S)
                self._give(plan.feed(self._now()))
                self._mend_links()
                self._leave_out_the_slow()
                self._check_quiet()
                if self._late(begun):
                    self._drop_late_ones()
            attempt += 1
            if await self._prepared(attempt):
                break
        self._step_pace.observe(self._now() - begun)
        self._commit(attempt)

    def _commit(self, attempt: int) -> None:
        assert self._plan is not None
        tokens = len(self._losses) * self._manifest.tokens_per_microbatch
        loss = sum(self._losses.values()) / tokens if tokens else None
        owners = {stage: list(self._plan.contributors(stage)) for stage in self._shared_stages()}
        for member in self._crew.present():
            said = {"op": "commit", "term": self.term, "step": self.step, "attempt": attempt, "loss": loss}
            mates = [m.peer for m in self._crew.of_stage(member.stage) if m.standing == "ready"]
            member.say({**said, "owners": owners.get(member.stage), "mates": mates})
            if member.standing == "ready":
                member.step = self.step + 1
        self._plan = None
        self.step += 1

    async def _prepared(self, attempt: int) -> bool:
        """Have the workers of each shared stage exchange their sums. False: somebody was lost, and work came back."""
        plan, waiting = self._plan, set[PeerId]()
        assert plan is not None
        for stage in self._shared_stages():
            owners = list(plan.contributors(stage))
            for member in self._crew.of_stage(stage):
                if member.standing != "away":
                    said = {"op": "prepare", "term": self.term, "step": self.step, "attempt": attempt}
                    member.say({**said, "owners": owners})
                if member.standing == "ready":
                    waiting.add(member.peer)
        deadline = self._now() + QUIET_S
        while waiting:
            heard = await self._hear(max(0.01, deadline - self._now()))
            if not plan.complete:
                return False
            if heard is None:
                raise StepLost(f"stage {self._crew.members[min(waiting)].stage} did not exchange its gradients")
            member, message = heard
            ours = (message.get("step"), message.get("attempt")) == (self.step, attempt)
            if message["op"] == "gone" or (message["op"] == "prepared" and ours):
                waiting.discard(member.peer)
            elif message["op"] == "unprepared" and ours:
                if attempt >= PREPARE_TRIES:  # he cannot reach the others: they do his part, and he catches up
                    self._fell_behind(member)
                return False
        return True

    def _shared_stages(self) -> list[int]:
        """Stages whose workers exchange gradients: those with several, some of whom may be behind."""
        if not self._exact:
            return []
        return [s for s in self._stages if sum(m.standing != "away" for m in self._crew.of_stage(s)) > 1]

    # --- validation -------------------------------------------------------------------------------------------------

    def _evaluation_due(self) -> bool:
        schedule = self._manifest.schedule
        return self._windows > 0 and (self.step % schedule.evaluate_every == 0 or self.step == schedule.steps)

    async def _evaluate(self) -> None:
        """Send every validation window through; what gets lost on the way is sent again."""
        results: dict[int, tuple[float, int]] = {}
        while len(results) < self._windows:
            await self._everybody_works()
            due = [index for index in range(self._windows) if index not in results]
            self._send_windows(due)
            deadline = self._now() + max(10.0, self._step_pace.next_s())
            while len(results) < self._windows and self._now() < deadline:
                heard = await self._hear(max(0.01, deadline - self._now()))
                if heard is None:
                    break
                message = heard[1]
                if message["op"] in ("gone", "lost"):
                    break
                if message["op"] == "evaluated" and message.get("step") == self.step:
                    index, loss, tokens = message.get("index"), message.get("loss"), message.get("tokens")
                    if index in due and isinstance(loss, float) and type(tokens) is int and tokens > 0:
                        results[index] = loss, tokens
        total, tokens = map(sum, zip(*results.values(), strict=True))
        self._events.validated(self.step, total / tokens)

    def _send_windows(self, indexes: list[int]) -> None:
        now = self._now()
        for number, index in enumerate(indexes):
            path = []
            for stage in self._stages:
                able = [m for m in self._crew.of_stage(stage) if m.works(now)]
                path.append(able[number % len(able)])
            for stage, member in enumerate(path):
                source = path[stage - 1].peer if stage else None
                target = path[stage + 1].peer if stage + 1 < len(path) else None
                said = {"op": "window", "term": self.term, "step": self.step, "index": index}
                member.say({**said, "source": source, "target": target})

    # --- what happens meanwhile -------------------------------------------------------------------------------------

    async def _hear(self, within_s: float) -> tuple[Member, Message] | None:
        if self._crew.superseded:
            raise Unavailable(f"the workers follow {self._crew.superseded[:16]}…")
        heard = await self._crew.hear(within_s)
        if heard is not None:
            self._take_in(*heard)
        return heard

    def _take_in(self, member: Member, message: Message) -> None:
        op = message["op"]
        if op == "done":
            self._done(member, message)
        elif op == "gone":
            self._gone(member)
        elif op == "here" and self._active:
            self._welcome(member)
        elif op == "lost":
            self._link_lost(member, message.get("peer"))
        elif op == "in_step" and member.standing == "behind" and self._counts_as_in_step(message.get("step")):
            self._open(member)
            log.info("worker_in_step", peer_id=member.peer, stage=member.stage, step=self.step)
        elif op == "gate":
            member.rests = str(message.get("reason", ""))[:100]
        elif op == "checkpoint" and type(message.get("step")) is int:
            member.checkpoints = [*member.checkpoints[-KEPT:], message["step"]]
        elif op == "state":
            read_state(member, message)
            if self._active:
                self._fell_behind(member)

    def _counts_as_in_step(self, step: object) -> bool:
        """With rounds, workers of a stage are never quite alike: one who was alike lately will do."""
        return step == self.step or (not self._exact and type(step) is int and step < self.step)

    def _done(self, member: Member, message: Message) -> None:
        index, loss, now = message.get("index"), message.get("loss"), self._now()
        if self._plan is None or message.get("step") != self.step or type(index) is not int:
            return
        if self._plan.done(member.peer, index, now):
            self._pace[member.stage].observe(now - self._last_done.get(member.peer, now))
            self._last_done[member.peer] = now
            if member.stage == self._stages[-1] and isinstance(loss, float):
                self._losses[index] = loss

    def _gone(self, member: Member) -> None:
        self._tell_who_is_alone(member.stage)
        if self._plan is not None:
            self._lose(member)

    def _lose(self, member: Member) -> None:
        """Give his microbatches to others."""
        assert self._plan is not None
        orders = self._plan.lose(member.peer, self._now())
        if orders is None:
            raise StepLost(f"stage {member.stage} has no worker left")
        self._give(orders)

    def _welcome(self, member: Member) -> None:
        """A worker came, or came back. One who has the open step in his memory has missed nothing but his own work."""
        if (member.step, member.past) == (self.step, self.past):
            self._open(member)
        else:
            self._sync(member)

    def _fell_behind(self, member: Member) -> None:
        """He says that he has lost the thread: others do his part, and he catches up."""
        if member.standing == "ready" and self._plan is not None:
            self._lose(member)
        member.standing, member.step = "behind", None
        self._sync(member)

    def _sync(self, member: Member) -> None:
        """Have a worker who is behind get the parameters from one of his stage who is not."""
        donors = [m for m in self._crew.of_stage(member.stage) if m.standing == "ready"]
        if donors:
            member.say({"op": "sync", "past": self.past, "donors": [m.peer for m in donors]})

    # --- links and slow workers -------------------------------------------------------------------------------------

    def _link_lost(self, member: Member, peer: object) -> None:
        other = self._crew.members.get(PeerId(peer)) if isinstance(peer, str) else None
        if other is None or self._plan is None or abs(other.stage - member.stage) != 1:
            return
        upper, lower = (member, other) if member.stage < other.stage else (other, member)
        tries, _ = self._broken.get((upper.peer, lower.peer), (0, 0.0))
        self._broken[upper.peer, lower.peer] = tries + 1, self._now() + LINK_RETRY_S * 2 ** min(tries, 5)

    def _mend_links(self) -> None:
        """Send again what was under way over links that broke; after some tries, do without the lower worker."""
        plan, now = self._plan, self._now()
        assert plan is not None
        for (upper, lower), (tries, due) in list(self._broken.items()):
            crossing = plan.crossing(upper, lower)
            if not crossing:
                del self._broken[upper, lower]
            elif now >= due:
                self._broken[upper, lower] = tries, now + LINK_RETRY_S * 2 ** min(tries, 5)
                member = self._crew.members.get(lower)
                if member is not None and tries >= LINK_TRIES and self._has_sibling(member):
                    self._leave_out(member)
                elif member is not None:
                    self._give(plan.again(crossing, member.stage))

    def _leave_out_the_slow(self) -> None:
        """A worker who is late while others of his stage have nothing to do holds everybody up."""
        plan, now = self._plan, self._now()
        assert plan is not None
        for stage in self._stages:
            able = [m for m in self._crew.of_stage(stage) if m.works(now)]
            owing = {m.peer: plan.owes(m.peer, stage) for m in able}
            if not any(count == 0 for count in owing.values()):
                continue
            for member in able:
                quiet = now - self._last_done.get(member.peer, now)
                if owing[member.peer] and quiet > self._pace[stage].next_s():
                    self._leave_out(member)
                    break

    def _leave_out(self, member: Member) -> None:
        log.info("left_out", peer_id=member.peer, stage=member.stage, step=self.step, seconds=LEFT_OUT_S)
        member.out_until = self._now() + LEFT_OUT_S
        member.say({"op": "reset", "term": self.term, "step": self.step})
        member.standing = "behind"  # he goes on with the others' sums, and says when he is in step again
        self._lose(member)

    def _has_sibling(self, member: Member) -> bool:
        now = self._now()
        return any(m is not member and m.works(now) for m in self._crew.of_stage(member.stage))

    def _check_quiet(self) -> None:
        if any(m.rests for m in self._crew.present()):
            self._last_done |= {m.peer: self._now() for m in self._crew.present()}
        last = max(self._last_done.values(), default=self._now())
        if self._now() - last > QUIET_S:
            self._last_done = {}
            raise StepLost(f"nobody finished a microbatch of step {self.step} for {QUIET_S:.0f} s")

    def _late(self, begun: float) -> bool:
        plan = self._plan
        assert plan is not None
        enough = 2 * plan.finished >= self._manifest.schedule.microbatches
        return self._drop_late and enough and self._now() - begun > self._step_pace.next_s()

    def _drop_late_ones(self) -> None:
        assert self._plan is not None
        late = self._plan.drop()
        for index in late:
            self._losses.pop(index, None)
        self._crew.say_all({"op": "drop", "term": self.term, "step": self.step, "indexes": late})
        log.info("microbatches_dropped", step=self.step, indexes=late)

    # --- saying -----------------------------------------------------------------------------------------------------

    def _give(self, orders: list[Order]) -> None:
        """Tell everybody on a path who his neighbours are; in one message each."""
        takes: dict[PeerId, list[list[object]]] = {}
        for order in orders:
            near = (
                range(len(order.path)) if not order.again else range(order.stage, min(order.stage + 3, len(order.path)))
            )
            for stage in near:
                source = order.path[stage - 1] if stage else None
                target = order.path[stage + 1] if stage + 1 < len(order.path) else None
                again = order.again and stage == order.stage
                takes.setdefault(order.path[stage], []).append([order.index, source, target, again])
        for peer, rows in takes.items():
            member = self._crew.members.get(peer)
            if member is None:
                raise Misbehaviour(f"{peer[:16]}… has no seat")
            member.say({"op": "take", "term": self.term, "step": self.step, "rows": rows})

    def _ready(self) -> list[Member]:
        return [m for m in self._crew.members.values() if m.standing == "ready"]
