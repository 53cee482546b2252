"""A joiner shows that his machine computes what the others' do, before his work counts.

The examiner, a worker of the stage, sends microbatches that he has logged himself; the joiner, who has the same
parameters by then, answers with what he makes of them, and the examiner compares with what he sent his neighbours.

    examiner: {"step", "index", "code", "gradient"}, code in ‖ gradient in      (byte counts; 0 where none enters)
    joiner:   {"code", "gradient", "loss"}, code out ‖ gradient out ‖ loss

A joiner who passes the question on to a friend passes the probe; audits of his own work are what he cannot pass on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyio import to_thread

from tessera.core.errors import Invalid, Misbehaviour, Missing, Refused
from tessera.core.ids import PeerId
from tessera.models.distance import compare, tolerance
from tessera.models.replay import LOSS_BYTES, Replayer, pack_loss, unpack_loss
from tessera.models.trainer import check_ids
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.training.audit import check_place
from tessera.training.audit_log import AuditLog

__all__ = ["PROBE", "Examiner", "serve_probe"]

PROBE = "tessera/probe/1"
SLACK_BYTES = 4096

Ids = Callable[[int, int], Any]


@dataclass(frozen=True, slots=True)
class Examiner:
    """Asks a joiner of the same stage.

    Args:
        replayer: any of the stage; its parameters do not matter, its wire and stage do.
        own: the examiner's log.
        ids: token ids [B, T+1] of (step, microbatch).
        answer_s: for each microbatch.
    """

    transport: Transport
    replayer: Replayer
    own: AuditLog
    ids: Ids
    message_bytes: int
    answer_s: float = 20.0

    async def probe(self, joiner: PeerRecord, version: bytes, count: int, rng: random.Random) -> None:
        """Have `joiner` replay `count` microbatches of a step that began with the parameters `version`.

        Raises: Misbehaviour: one of his answers is wrong, with its place as evidence.  Missing: we keep no such step,
            or not as many microbatches of it; what `call` raises.
        """
        step = next((s for s in self.own.steps if self.own.params(s).version == version), None)
        done = [] if step is None else self._done(step)
        if step is None or len(done) < count:
            raise Missing(f"no {count} microbatches with parameters {version.hex()[:16]}… are kept here")
        for index in rng.sample(done, count):
            await self._ask(joiner, step, index)

    def _done(self, step: int) -> list[int]:
        stage = self.replayer.stage
        return sorted(self.own.losses(step) if stage.last else self.own.messages(step, "gradient_in"))

    async def _ask(self, joiner: PeerRecord, step: int, index: int) -> None:
        code = self.own.messages(step, "code_in").get(index, b"")
        gradient = self.own.messages(step, "gradient_in").get(index, b"")
        request = {"step": step, "index": index, "code": len(code), "gradient": len(gradient)}
        head, body = await call(
            self.transport, joiner, PROBE, request, code + gradient,
            timeout_s=self.answer_s, reply_limit=2 * self.message_bytes + SLACK_BYTES,
        )  # fmt: skip
        wrong = await to_thread.run_sync(self._compared, step, index, head, body)
        if wrong:
            place = {"peer": joiner.id, "step": step, "index": index}
            raise Misbehaviour(f"{joiner.id[:16]}… does not compute as this stage does: {wrong}", evidence=place)

    def _compared(self, step: int, index: int, head: dict[str, Any], body: bytes) -> str:
        """What is wrong with an answer; empty when nothing is."""
        own_code, own_gradient = (self.own.messages(step, r).get(index, b"") for r in ("code_out", "gradient_out"))
        own_loss = self.own.losses(step).get(index, b"")
        sizes = [head.get("code"), head.get("gradient"), head.get("loss")]
        if sizes != [len(own_code), len(own_gradient), len(own_loss)] or len(body) != sum(sizes):
            return f"messages of {sizes} bytes, not {[len(own_code), len(own_gradient), len(own_loss)]}"
        code, gradient = body[: len(own_code)], body[len(own_code) : len(own_code) + len(own_gradient)]
        limits = tolerance(self.replayer.spec.model.compute, len(self.replayer.stage.layers))
        batch, columns = check_ids(self.ids(step, index), self.replayer.spec).shape
        wire = self.replayer.wire
        for what, said, own in (("code", code, own_code), ("gradient", gradient, own_gradient)):
            if own:
                # Both sides are rounded, with the same noise: our dequantised message rounds to itself.
                distance = compare(wire, said, wire.unpack(own, batch, columns - 1))
                if limits.used(distance) > 1:
                    return f"{what} {distance.mean:.3g} steps from ours"
        if own_loss:
            said_loss, loss = unpack_loss(body[-LOSS_BYTES:]), unpack_loss(own_loss)
            if not abs(said_loss - loss) <= limits.relative * abs(loss):
                return f"a loss of {said_loss:.6g} nats, ours is {loss:.6g}"
        return ""


def serve_probe(
    transport: Transport, replayer_of: Callable[[int], Replayer], ids: Ids, admitted: Callable[[PeerId], bool],
    *, message_bytes: int,
) -> None:  # fmt: skip
    """Answer an examiner.

    Args:
        replayer_of: one with our parameters of a step. Raises: Missing: we have none.
        admitted: whether a peer holds this stage.
    """

    async def answer(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if not admitted(peer):
            raise Refused("only workers of this stage examine a joiner", rule="stage")
        step, index, cut, rest = (request.get(key) for key in ("step", "index", "code", "gradient"))
        check_place(step, index)
        if type(step) is not int or type(index) is not int or type(cut) is not int or type(rest) is not int:
            raise Invalid("step, index, code and gradient are numbers")
        if min(cut, rest) < 0 or cut + rest != len(body):
            raise Invalid(f"{len(body)} bytes of messages, not {cut} and {rest}")
        replayer = replayer_of(step)

        def work() -> tuple[dict[str, Any], bytes]:
            return _answer(replayer, step, index, ids(step, index), body[:cut] or None, body[cut:] or None)

        return await to_thread.run_sync(work)

    serve_calls(transport, PROBE, answer, request_limit=2 * message_bytes + SLACK_BYTES, max_streams=2)


def _answer(
    replayer: Replayer, step: int, index: int, ids: Any, code: bytes | None, gradient: bytes | None
) -> tuple[dict[str, Any], bytes]:
    replay = replayer.replay(step, index, ids, code, gradient)
    wire = replayer.wire
    out = b"" if replay.code_BTW is None else wire.pack(replay.code_BTW)
    back = b"" if replay.gradient_BTW is None else wire.pack(replay.gradient_BTW, replay.gradient_noise)
    loss = b"" if replay.loss is None else pack_loss(replay.loss)
    return {"code": len(out), "gradient": len(back), "loss": len(loss)}, out + back + loss
