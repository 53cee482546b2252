"""Parameters and optimiser of a stage, from one of its workers to another who is behind.

The donor takes a copy between two microbatches, so his own work is held up only for that, and sends it as bulk:
everything else on his uplink goes first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tessera.core.errors import Invalid, Misbehaviour, Refused, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.protocols import SMALL, STATE, WORK_S

__all__ = ["StateDonor", "fetch_state"]

CHUNK_BYTES = 4 << 20
CHUNK_S = 120.0  # 4 MiB at 0.28 Mb/s
STATE_LIMIT = 1 << 40  # bytes


class StateDonor:
    """Serves our state to workers of our own stage, and to nobody else.

    Args:
        admitted: whether a peer has a seat in our stage.
        copy: the step that is open, and what the trainer saves; None while we are behind ourselves.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        admitted: Callable[[PeerId], bool],
        copy: Callable[[], Awaitable[tuple[int, bytes] | None]],
    ) -> None:
        self._transport, self._admitted, self._copy = transport, admitted, copy
        self._held: dict[str, bytes] = {}  # the newest copy only, by its digest

    def serve(self) -> None:
        serve_calls(self._transport, STATE, self._answer, request_limit=SMALL, max_streams=4)

    async def _answer(self, peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if not self._admitted(peer):
            raise Refused("only workers of this stage may have its parameters", rule="own_stage")
        op, offset = request.get("op"), request.get("offset")
        if op == "begin":
            copied = await self._copy()
            if copied is None:
                raise Unavailable("this worker is behind itself: ask another", retry_after_s=1.0)
            step, data = copied
            digest = sha256(data).hex()
            self._held = {digest: data}
            return {"step": step, "size": len(data), "digest": digest}, b""
        if op != "chunk":
            raise Invalid(f"unknown operation {str(op)[:40]!r}")
        held = self._held.get(str(request.get("digest")))
        if held is None:
            raise Unavailable("a newer copy took this one's place: begin again", retry_after_s=0.0)
        if type(offset) is not int or not 0 <= offset < len(held):
            raise Invalid(f"a chunk starts inside the state, not at {str(offset)[:20]}")
        return {}, held[offset : offset + CHUNK_BYTES]


async def fetch_state(transport: Transport, donor: PeerRecord) -> tuple[int, bytes]:
    """The donor's open step and his state. Raises what `call` raises; Misbehaviour when it is not what he announced."""
    reply, _ = await call(transport, donor, STATE, {"op": "begin"}, timeout_s=WORK_S, reply_limit=SMALL)
    step, size, digest = reply.get("step"), reply.get("size"), reply.get("digest")
    if type(step) is not int or step < 0 or type(size) is not int or not 0 < size <= STATE_LIMIT:
        raise Misbehaviour(f"a state of {str(size)[:20]} bytes at step {str(step)[:20]} cannot be", evidence=donor.id)
    data = bytearray()
    while len(data) < size:
        request = {"op": "chunk", "digest": digest, "offset": len(data)}
        limit = CHUNK_BYTES + SMALL
        _, chunk = await call(transport, donor, STATE, request, timeout_s=CHUNK_S, reply_limit=limit, bulk=True)
        if not chunk:
            raise Misbehaviour(f"the state ends at {len(data)} of {size} bytes", evidence=donor.id)
        data += chunk
    state = bytes(data)
    if len(state) != size or sha256(state).hex() != digest:
        raise Misbehaviour("the state is not what its donor announced", evidence=donor.id)
    return step, state
