"""What a worker keeps so that he can be audited: the messages and the parameters of his last steps. And how he answers.

    auditor: {"op": "promise",  "step"}                      worker: {"commitment"}, rows of receipts by him and for him
    auditor: {"op": "params",   "step", "offset"}            worker: {"size"}, one chunk of the packed parameters
    auditor: {"op": "payloads", "step", "role", "of", "indices"}     {"sizes"}, hashes of `of` ‖ messages of `indices`
    auditor: {"op": "update",   "step", "offset"}                    {"size"}, one chunk of his sum of gradients
    auditor: {"op": "losses",   "step"}                              {}, the packed losses of his microbatches

Messages are codes, so a window of them is small; the parameters are one copy for each step in the window.

Invariants: answers hold only what was logged; memory is bounded by the window, and whatever `hold` keeps beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyio import to_thread

from tessera.core import encoding
from tessera.core.errors import Invalid, Missing, Refused
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.models.replay import Snapshot
from tessera.p2p.calls import serve_calls
from tessera.p2p.transport import Transport
from tessera.training.audit import check_place
from tessera.training.audit_commitment import (
    MAX_FLOWS,
    Commitment,
    Direction,
    Sent,
    SignedReceipt,
    check_microbatches,
)
from tessera.training.audit_evidence import ROLES, Role
from tessera.training.receipts import payloads_digest

__all__ = ["AUDIT", "CHUNK_BYTES", "AuditLog", "serve_audits"]

AUDIT = "tessera/audit/1"
CHUNK_BYTES = 4 * 2**20
REQUEST_LIMIT = 16 * 1024  # bytes: one that names every microbatch of a step twice takes 11,000
MAX_HELD = 64  # steps beyond the window


@dataclass(slots=True)
class _Step:
    params: Snapshot
    messages: dict[Role, dict[int, bytes]] = field(default_factory=lambda: {role: {} for role in ROLES})
    to: dict[tuple[Role, int], PeerId] = field(default_factory=dict)  # who got an output
    losses: dict[int, bytes] = field(default_factory=dict)
    update: bytes = b""
    commitment: Commitment | None = None


class AuditLog:
    """One worker's. Not safe for use from two threads at once, but `commit` may run in a thread while others read.

    Args:
        window_steps: how many steps stay, the open one included.
    """

    def __init__(self, run_id: RunId, window_steps: int) -> None:
        if window_steps < 1:
            raise Invalid(f"a window has at least one step, not {window_steps}")
        self._run_id, self._window = run_id, window_steps
        self._steps: dict[int, _Step] = {}
        self._held: set[int] = set()

    def open(self, step: int, params: Snapshot) -> None:
        """Begin (again) the log of `step`, which starts from `params`; what has left the window is dropped."""
        self._steps[step] = _Step(params)
        for old in [s for s in self._steps if s <= step - self._window and s not in self._held]:
            del self._steps[old]

    def keep(self, step: int, index: int, role: Role, message: bytes, peer: PeerId) -> None:
        """Log a message that came from `peer`, or went to him."""
        entry = self._step(step)
        entry.messages[role][index] = message
        entry.to[role, index] = peer

    def keep_loss(self, step: int, index: int, packed: bytes) -> None:
        """Log a microbatch's loss, on the last stage."""
        self._step(step).losses[index] = packed

    def commit(self, step: int, key: PeerKey, update: bytes) -> Commitment:
        """The signed commitment of a step whose microbatches are through. Send it before anybody draws.

        Args:
            update: the sum of gradients, in the bytes that go to the replicas.
        """
        entry = self._step(step)
        done = sorted(entry.losses or entry.messages["gradient_in"])
        sent = _sent(entry, "forward", "code_out", done) + _sent(entry, "backward", "gradient_out", done)
        losses = _digest(entry.losses, done) if entry.losses else bytes(32)
        unsigned = Commitment(
            self._run_id, step, key.id, entry.params.version, tuple(done), sent, losses, sha256(update)
        )
        entry.update, entry.commitment = update, unsigned.signed_by(key)
        return entry.commitment

    def hold(self, steps: Iterable[int]) -> None:
        """Keep these beyond the window, and no others: samples for who joins later. Raises: Invalid: too many."""
        wanted = set(steps)
        if len(wanted) > MAX_HELD:
            raise Invalid(f"at most {MAX_HELD} steps are held, not {len(wanted)}")
        self._held = wanted

    @property
    def steps(self) -> list[int]:
        return sorted(self._steps)

    def in_time(self, step: int) -> bool:
        """Whether all who are at our step, or about to end it, keep `step` for certain."""
        return step in self._steps and max(self._steps) - step < max(self._window - 1, 2)

    def params(self, step: int) -> Snapshot:
        """What the step began with. Raises: Missing: outside the window."""
        return self._step(step).params

    def commitment(self, step: int) -> Commitment:
        entry = self._step(step)
        if entry.commitment is None:
            raise Missing(f"step {step} is not finished here")
        return entry.commitment

    def messages(self, step: int, role: Role) -> Mapping[int, bytes]:
        return self._step(step).messages[role]

    def losses(self, step: int) -> Mapping[int, bytes]:
        return self._step(step).losses

    def update(self, step: int) -> bytes:
        return self._step(step).update

    def _step(self, step: int) -> _Step:
        entry = self._steps.get(step)
        if entry is None:
            raise Missing(f"step {step} is not kept here: steps {self.steps} are")
        return entry


def serve_audits(
    transport: Transport,
    log: AuditLog,
    admitted: Callable[[PeerId], bool],
    *,
    receipts: Callable[[int], Iterable[SignedReceipt]] = lambda step: (),
    max_streams: int = 8,
) -> None:
    """Answer auditors out of `log`.

    Args:
        admitted: whether a peer holds this stage too. Parameters go to nobody else.
        receipts: of a step, by us and for us.
    """

    async def answer(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if not admitted(peer):
            raise Refused("only workers of this stage audit it", rule="stage")
        step = request.get("step")
        check_place(step, None)
        assert isinstance(step, int)
        match request.get("op"):
            case "promise":
                rows = [receipt.to_row() for receipt in receipts(step)]
                return {"commitment": log.commitment(step).to_row()}, encoding.encode(rows[:MAX_FLOWS])
            case "params":
                packed = await to_thread.run_sync(log.params(step).pack)  # a copy of all parameters: not in the loop
                return _chunk(packed, request.get("offset"))
            case "update":
                return _chunk(log.update(step), request.get("offset"))
            case "losses":
                losses = log.losses(step)
                return {}, b"".join(losses[index] for index in sorted(losses))
            case "payloads":
                return _payloads(log, step, request)
        raise Invalid(
            f"an auditor asks for promise, params, payloads, update or losses, not {str(request.get('op'))[:40]!r}"
        )

    serve_calls(transport, AUDIT, answer, request_limit=REQUEST_LIMIT, max_streams=max_streams)


def _payloads(log: AuditLog, step: int, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    role = request.get("role")
    if role not in ROLES:
        raise Invalid(f"a role is one of {', '.join(ROLES)}, not {str(role)[:20]!r}")
    of = check_microbatches(request.get("of"))
    wanted = request.get("indices")
    indices = () if wanted == [] else check_microbatches(wanted)
    logged = log.messages(step, role)
    lacking = [index for index in {*of, *indices} if index not in logged]
    if lacking:
        raise Missing(f"no {role} of microbatch {min(lacking)} of step {step} is kept here")
    messages = [logged[index] for index in indices]
    hashes = [sha256(logged[index]) for index in of]
    return {"sizes": [len(message) for message in messages]}, b"".join(hashes + messages)


def _chunk(data: bytes, offset: object) -> tuple[dict[str, Any], bytes]:
    if type(offset) is not int or not 0 <= offset <= len(data):
        raise Invalid(f"an offset lies in 0 to {len(data)}, not {str(offset)[:40]}")
    return {"size": len(data)}, data[offset : offset + CHUNK_BYTES]


def _sent(entry: _Step, direction: Direction, role: Role, done: list[int]) -> tuple[Sent, ...]:
    """What each neighbour got of the microbatches that are done."""
    logged = entry.messages[role]
    groups: dict[PeerId, list[int]] = {}
    for index in done:
        if index in logged:
            groups.setdefault(entry.to[role, index], []).append(index)
    return tuple(Sent(direction, peer, _digest(logged, indices)) for peer, indices in sorted(groups.items()))


def _digest(logged: Mapping[int, bytes], indices: list[int]) -> bytes:
    return payloads_digest({index: sha256(logged[index]) for index in indices})
