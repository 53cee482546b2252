"""A stage's newest checkpoints, from one of its workers to another, over their own encrypted link.

    offer ─▶ the steps, sizes and digests of the newest        chunk ─▶ a piece of one of them

Only workers of the same stage are served, so no machine sees another stage's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyio import to_thread

from tessera.core.errors import Invalid, Misbehaviour, Refused
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.checkpoints import Checkpoints
from tessera.training.protocols import SMALL, STATE, WORK_S

__all__ = ["StateServer", "fetch_state"]

CHUNK_BYTES = 4 << 20
CHUNK_S = 120.0  # 4 MiB at 0.28 Mb/s
STATE_LIMIT = 1 << 40  # bytes of one checkpoint
NEWEST = 2  # checkpoints: the newest that all stages hold is one of them


class StateServer:
    """Args:
    allowed: whether a peer works at our stage.
    """

    def __init__(self, transport: Transport, checkpoints: Checkpoints, allowed: Callable[[PeerId], bool]) -> None:
        self._transport, self._checkpoints, self._allowed = transport, checkpoints, allowed

    def serve(self) -> None:
        serve_calls(self._transport, STATE, self._answer, request_limit=SMALL, max_streams=4)

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if not self._allowed(peer):
            raise Refused("only workers of this stage may have its parameters", rule="same_stage")
        if request.get("op") == "offer":
            return {"checkpoints": await to_thread.run_sync(self._offer)}, b""
        if request.get("op") == "chunk":
            return {}, await self._chunk(request.get("step"), request.get("offset"))
        raise Invalid(f"unknown operation {str(request.get('op'))[:40]!r}")

    def _offer(self) -> list[list[Any]]:
        steps = [step for step in self._checkpoints.steps() if step > 0][-NEWEST:]
        return [[step, *self._checkpoints.describe(step)] for step in steps]

    async def _chunk(self, step: object, offset: object) -> bytes:
        if type(step) is not int or type(offset) is not int or not 0 <= offset < STATE_LIMIT:
            raise Invalid(f"a chunk has a step and an offset from 0, not {str(step)[:20]} and {str(offset)[:20]}")
        return await to_thread.run_sync(self._checkpoints.read, step, offset, CHUNK_BYTES)


async def fetch_state(transport: Transport, source: PeerRecord, checkpoints: Checkpoints) -> list[int]:
    """Bring those of `source`'s newest checkpoints that are not here, and return their steps.

    Raises: Missing when one was dropped meanwhile: ask again; Misbehaviour for what is not as it was offered.
    """
    reply, _ = await call(transport, source, STATE, {"op": "offer"}, timeout_s=WORK_S, reply_limit=SMALL)
    rows = reply.get("checkpoints")
    if not isinstance(rows, list) or len(rows) > NEWEST:
        raise Misbehaviour(f"{source.id[:16]}… offers {str(reply)[:100]}", evidence=source.id)
    here, fetched = checkpoints.steps(), []
    for step, size, digest in map(_parse_offer, rows):
        if step not in here:
            state = await _fetch(transport, source, step, size)
            if len(state) != size or sha256(state).hex() != digest:
                raise Misbehaviour(f"the checkpoint of step {step} is not what was offered", evidence=source.id)
            await to_thread.run_sync(checkpoints.save, step, state)
            fetched.append(step)
    return fetched


async def _fetch(transport: Transport, source: PeerRecord, step: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        request = {"op": "chunk", "step": step, "offset": len(data)}
        limit = CHUNK_BYTES + SMALL
        _, chunk = await call(transport, source, STATE, request, timeout_s=CHUNK_S, reply_limit=limit, bulk=True)
        if not chunk:
            raise Misbehaviour(f"the checkpoint of step {step} ends at {len(data)} of {size} bytes", evidence=source.id)
        data += chunk
    return bytes(data)


def _parse_offer(row: object) -> tuple[int, int, str]:
    if not isinstance(row, list) or len(row) != 3:
        raise Misbehaviour(f"a checkpoint is offered as step, size and digest, not {str(row)[:60]}")
    step, size, digest = row
    if type(step) is not int or type(size) is not int or not isinstance(digest, str):
        raise Misbehaviour(f"a checkpoint is offered as step, size and digest, not {str(row)[:60]}")
    if not 0 < step < 2**53 or not 0 < size <= STATE_LIMIT:
        raise Misbehaviour(f"a checkpoint of step {step} and {size} bytes cannot be")
    return step, size, digest
