"""A change of a run's workers: proposed by whom it concerns, signed by more than two thirds of them, put on the chain.

    joiner  ─▶ every worker   may I come?   my seat, which the contract drew
    leaver  ─▶ every worker   may I go?     what I signed last goes along: it would be lost with me
    anybody ─▶ every worker   has he gone?  nobody has heard of him for a while

The proposer posts what the others signed. Each change has a number, so a signature serves once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anyio
import structlog

from tessera.chain.client import RpcChain
from tessera.chain.consent import NOBODY, Consent
from tessera.chain.faces import Run
from tessera.core import encoding
from tessera.core.errors import Conflict, Misbehaviour, TesseraError, Unavailable
from tessera.core.ids import Account
from tessera.core.signing import AccountKey, recover_account
from tessera.p2p.calls import call
from tessera.p2p.transport import Transport
from tessera.training.manifest import Manifest
from tessera.training.protocols import CALL_S, MEMBERSHIP, SMALL
from tessera.training.receipts import Receipt
from tessera.training.roster import Roster, Seat

__all__ = ["Proposal", "propose"]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Proposal:
    """Who is to come, or who is to go."""

    joiner: Seat | None = None
    leaver: Account | None = None
    last_signed: tuple[Receipt, ...] = ()  # by the leaver

    def digest(self, manifest: Manifest, run: Account, number: int) -> bytes:
        """What a worker signs."""
        joiner, leaver = NOBODY if self.joiner is None else self.joiner.account, self.leaver or NOBODY
        return Consent(manifest.chain_id, run, manifest.run_id).change(number, joiner, leaver)

    def request(self, number: int) -> dict[str, Any]:
        joiner = None if self.joiner is None else self.joiner.to_value()
        return {"op": "vote", "number": number, "joiner": joiner, "leaver": self.leaver}


async def propose(
    transport: Transport, chain: RpcChain, key: AccountKey, manifest: Manifest, roster: Roster, proposal: Proposal
) -> None:
    """Ask every worker for his signature, our own included where we are one, and post the change.

    Raises: Conflict when `roster` is not the chain's, or somebody was first: ask for it again, then retry; Unavailable
    when too few sign.
    """
    run = Run(chain, roster.run)
    number = await run.change_count()
    if number != roster.changes:
        raise Conflict(f"the workers have changed {number} times, we know of {roster.changes}")
    digest = proposal.digest(manifest, roster.run, number)
    signatures: dict[Account, bytes] = {}
    body = encoding.encode([receipt.to_row() for receipt in proposal.last_signed])
    async with anyio.create_task_group() as tasks:
        for seat in roster.seats:
            if seat.account == key.account:
                signatures[key.account] = key.sign_digest(digest)
            elif seat.account != proposal.leaver:
                tasks.start_soon(_collect, transport, seat, proposal.request(number), body, digest, signatures)
    if 3 * len(signatures) <= 2 * len(roster.seats):
        raise Unavailable(
            f"{len(signatures)} of {len(roster.seats)} workers signed change {number}, more than 2/3 needed: "
            "wait until the others are here"
        )
    ordered = [signatures[account] for account in sorted(signatures, key=lambda a: int(a, 16))]
    joiner = NOBODY if proposal.joiner is None else proposal.joiner.account
    await run.change(key, number, joiner, proposal.leaver or NOBODY, ordered)
    log.info("workers_changed", number=number, joiner=joiner, leaver=proposal.leaver or NOBODY, signers=len(ordered))


async def _collect(
    transport: Transport,
    seat: Seat,
    request: dict[str, Any],
    body: bytes,
    digest: bytes,
    signatures: dict[Account, bytes],
) -> None:
    """Ask one worker for his signature; a refusal is logged, not fatal."""
    try:
        reply, _ = await call(transport, seat.record, MEMBERSHIP, request, body, timeout_s=CALL_S, reply_limit=SMALL)
        signature = bytes.fromhex(str(reply.get("signature", "")))
        if recover_account(digest, signature) != seat.account:
            raise Misbehaviour(f"{seat.peer[:16]}… signed something else")
        signatures[seat.account] = signature
    except (TesseraError, ValueError) as error:
        log.warning("signature_missing", peer_id=seat.peer, stage=seat.stage, reason=str(error))
