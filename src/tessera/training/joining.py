"""Joining a run: first look, then bond, then take a seat. All that the host says is checked against the run id.

look   what is there to do, and with whom       the stages that a draw may give now; nothing is taken
bond   here is my stake                         the host passes it on, and the contract draws a stage
take   give me a seat at that stage             the account's signature binds the stage with it

Before anything is bonded, the contract is checked: its code, its run, its asset, and its terms, which the manifest
fixes. Each step may be repeated: who has bonded, and died, is given the same stage again. Who comes before the run
starts is a worker with his seat. Later, it is his when the workers have let him in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.chain.client import RpcChain
from tessera.chain.faces import Run
from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Late, Misbehaviour, Unavailable
from tessera.core.ids import Account, RunId, parse_account
from tessera.p2p.calls import call
from tessera.p2p.transport import Transport
from tessera.training.bond import Status, pay_stake, peer_bytes, recall_bond, remember_bond
from tessera.training.contract import check_run
from tessera.training.gate import check_clock
from tessera.training.home import Home
from tessera.training.invitation import Invitation
from tessera.training.manifest import MANIFEST_LIMIT, Manifest, load_manifest
from tessera.training.protocols import CALL_S, JOIN, SMALL, WORK_S
from tessera.training.roster import Seat, seat_binding
from tessera.training.rpc_link import peer_rpc

__all__ = ["HostLink", "Member", "Offer", "Pace", "Taken", "look", "machine_name", "parse_pace", "take_seat"]

T = TypeVar("T")

CLOCK_LIMIT_S = 300.0  # more than that apart, and receipts, records and invitations expire at the wrong time
RETRY_S = 1.0


Seconds = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class Pace(BaseModel):
    """How fast a worker is, as he measured it himself, alone on his machine; used to forecast, never paid for.

    Fields as in `tessera.models.forecast.StagePace`: seconds for a token, or for an optimiser step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    backward_s: Seconds
    step_s: Seconds = 0.0
    evaluate_s: Seconds = 0.0
    machine: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""  # equal for workers that share their cores
    cores: Annotated[int, Field(ge=1, le=65_536)] = 1
    threads: Annotated[int, Field(ge=1, le=65_536)] = 1

    def of_stage(self, manifest: Manifest, measured: int, stage: int) -> Pace:
        """What it is likely to be at another stage than it was measured on."""
        times = manifest.model.flops_per_token(stage) / manifest.model.flops_per_token(measured)
        seconds = {name: getattr(self, name) * times for name in ("forward_s", "backward_s", "step_s", "evaluate_s")}
        return self.model_copy(update=seconds)


class Member(BaseModel):
    """A seat that is taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: int = Field(ge=0, lt=1024)
    pace: Pace | None = None


class _Reply(BaseModel):
    """What the host answers to a look."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: tuple[Annotated[int, Field(ge=0, lt=1024, strict=True)], ...] = Field(min_length=1, max_length=1024)
    run: str = Field(max_length=64)
    coin: str = Field(max_length=64)
    returning: bool
    phase: str = Field(max_length=16)
    step: int = Field(ge=0, lt=2**53)
    tokens_per_s: float = Field(ge=0, allow_inf_nan=False)
    now: int = Field(ge=0, lt=2**53)  # the host's clock, seconds since 1970
    members: tuple[Member, ...] = Field(max_length=1024)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a joiner would do."""

    manifest: Manifest
    stages: tuple[int, ...]  # that a draw may give now; one alone where it is drawn
    run: Account  # the contract that draws
    coin: Account  # what is bonded
    returning: bool  # the seat is ours already
    phase: str
    step: int
    tokens_per_s: float  # of the run now; 0 while it does not train
    members: tuple[Member, ...]

    @property
    def stage(self) -> int:
        """The one that takes most, of those that a draw may give."""
        return max(self.stages, key=self.manifest.model.flops_per_token)

    @property
    def place(self) -> int:
        """Which worker of that stage the joiner would be, from 1; meaningless for who returns."""
        return 1 + sum(member.stage == self.stage for member in self.members)


class HostLink:
    """Calls to the run's host, who may be away for a while.

    Args:
        patience_s: how long to look for it before giving up.
    """

    def __init__(self, transport: Transport, invitation: Invitation, *, patience_s: float, clock: Clock) -> None:
        self.transport, self.invitation, self.clock = transport, invitation, clock
        self._patience_s = patience_s

    async def call(
        self, protocol: str, request: dict[str, Any], *, reply_limit: int = SMALL, timeout_s: float = CALL_S
    ) -> tuple[dict[str, Any], bytes]:
        """One try."""
        host = self.invitation.host
        return await call(self.transport, host, protocol, request, timeout_s=timeout_s, reply_limit=reply_limit)

    def chain(self) -> RpcChain:
        """The run's chain, through the host."""
        return RpcChain(peer_rpc(self.transport, lambda: self.invitation.host))

    async def patiently(self, action: Callable[[], Awaitable[T]]) -> T:
        """Try again while the host is away. Raises `Unavailable`, with what to do, when it stays away."""
        deadline = anyio.current_time() + self._patience_s
        while True:
            try:
                return await action()
            except (Unavailable, Late) as error:
                if anyio.current_time() > deadline:
                    addresses = ", ".join(self.invitation.host.addrs)
                    raise Unavailable(
                        f"nobody answers for run {self.invitation.run_id[:16]}… at {addresses}: is it still running, "
                        f"and is a relay needed? Ask for a new invitation ({error.message})"
                    ) from error
                await anyio.sleep(RETRY_S)


async def look(host: HostLink) -> Offer:
    """What there is to do. Raises what the host says (no seat is free, the invitation is used up or taken back),
    Misbehaviour for a manifest that is not the run's, Invalid when the clocks differ by minutes.
    """
    reply, manifest = await _ask(host, {"op": "look"})
    try:
        offer = _Reply.model_validate(reply)
    except ValidationError as error:
        raise Misbehaviour(f"the host's offer cannot be read: {error.errors()[0]['msg']}") from error
    if max(offer.stages) >= manifest.model.stages:
        raise Misbehaviour(f"the host offers stage {max(offer.stages)} of {manifest.model.stages}")
    check_clock(offer.now, host.clock.time(), CLOCK_LIMIT_S)
    return Offer(
        manifest, offer.stages, parse_account(offer.run), parse_account(offer.coin), offer.returning, offer.phase,
        offer.step, offer.tokens_per_s, offer.members,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Taken:
    """A seat, as the contract drew it and the host gave it."""

    manifest: Manifest
    seat: Seat
    admitted: bool  # else the workers are to let us in


async def take_seat(host: HostLink, home: Home, pace: Pace | None) -> Taken:
    """Bond, and take the seat that is drawn; or the one that is ours already.

    Args:
        pace: measured on `Offer.stage`.

    Raises: as `look`, `check_run` and `pay_stake` do; Misbehaviour for a stage that the contract has not drawn.
    """
    offer = await look(host)
    run_id, key = host.invitation.run_id, home.peer_key
    stage = await _bonded(host, home, offer)
    binding = seat_binding(run_id, key.id, stage, home.account_key)
    seat = Seat(stage, host.transport.record(), home.account_key.account, binding)
    mine = None if pace is None else pace.of_stage(offer.manifest, offer.stage, stage).model_dump()
    reply, manifest = await _ask(host, {"op": "take", "seat": seat.to_value(), "pace": mine})
    admitted = reply.get("admitted")
    if type(admitted) is not bool:
        raise Misbehaviour(f"the host gives a seat with {str(reply)[:60]}")
    return Taken(manifest, seat, admitted)


async def _bonded(host: HostLink, home: Home, offer: Offer) -> int:
    """The stage that is drawn for us, once the contract has our stake."""
    manifest, key, chain = offer.manifest, home.account_key, host.chain()
    await check_run(chain, manifest, offer.run, offer.coin)
    folder = home.run_folder(manifest.run_id)
    if (before := recall_bond(folder)) not in (None, offer.run):
        raise Misbehaviour(f"the host names contract {offer.run}, we bonded in {before}: do not follow it")
    remember_bond(folder, manifest, offer.run)
    request: dict[str, Any] = {"op": "bond", "account": key.account, "authorization": None}
    reply, _ = await _ask(host, request)
    if reply.get("stage") is None:
        paid = await pay_stake(chain, manifest, offer.run, offer.coin, key, host.transport.id, host.clock)
        reply, _ = await _ask(host, {**request, "authorization": paid.to_value()})
    member, stage = await Run(chain, offer.run).members(key.account), reply.get("stage")
    if member.status not in (Status.DRAWN, Status.WORKER, Status.LEAVING) or stage != member.stage:
        raise Misbehaviour(f"the host gives stage {str(stage)[:20]}, the contract says {member}")
    if member.peer != peer_bytes(host.transport.id):
        raise Misbehaviour(f"{key.account} is bonded for peer {member.peer.hex()[:16]}…, not for this one")
    return member.stage


def machine_name(run_id: RunId) -> str:
    """The same for all workers of a run on this machine, and meaningless elsewhere. 16 hex digits."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        boot = os.uname().nodename if hasattr(os, "uname") else "unknown"
    return hashlib.sha256(f"{run_id} {boot}".encode()).hexdigest()[:16]


async def _ask(host: HostLink, request: dict[str, Any]) -> tuple[dict[str, Any], Manifest]:
    invitation = host.invitation
    question = {**request, "run_id": invitation.run_id, "invitation": invitation.id}
    reply, body = await host.call(JOIN, question, reply_limit=MANIFEST_LIMIT + 16 * SMALL, timeout_s=WORK_S)
    manifest = load_manifest(body, invitation.run_id)
    if manifest.chain_id != invitation.chain_id:
        raise Misbehaviour(f"the manifest is for chain {manifest.chain_id}, the invitation for {invitation.chain_id}")
    return reply, manifest


def parse_pace(value: object) -> Pace | None:
    """From a joiner. Raises `Invalid`."""
    try:
        return None if value is None else Pace.model_validate(value)
    except ValidationError as error:
        raise Invalid(f"a pace cannot be read: {error.errors()[0]['msg']}") from error
