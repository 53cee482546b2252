"""Lies around an audit: withheld answers, other bytes than were signed, framing neighbours, wrong accusations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from audit_world import (
    MICROBATCHES,
    RUN,
    STEP,
    Step,
    auditor_key,
    crew,
    honest_step,
    lot,
    replayer,
    scene,
    worker_key,
)
from tessera.core.errors import Invalid, Misbehaviour, Refused
from tessera.core.signing import PeerKey
from tessera.models.replay import Snapshot
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.memory import run_virtual
from tessera.p2p.transport import Transport
from tessera.training.audit import AuditConfig, Verdict, settle_credit
from tessera.training.audit_commitment import accepted
from tessera.training.audit_evidence import Evidence
from tessera.training.audit_judge import judge
from tessera.training.audit_log import AUDIT, AuditLog
from tessera.training.audit_service import Audited
from tessera.training.receipts import Receipt, payloads_digest

Handler = Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]


def answering(change: Callable[[dict[str, Any], dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> Any:
    """A worker who answers as he should, and then `change`s the answer."""

    def serve(transport: Transport, log: AuditLog) -> None:
        from tessera.training import audit_log

        async def answer(peer: str, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
            if request["op"] == "payloads":
                head, out = audit_log._payloads(log, request["step"], request)
            elif request["op"] == "params":
                head, out = audit_log._chunk(log.params(request["step"]).pack(), request["offset"])
            else:
                head, out = {}, b""
            return change(request, head, out)

        serve_calls(transport, AUDIT, answer)

    return serve


def audited(serve: Any, *, index: int | None = 1, own: Snapshot | None = None) -> Audited:
    done = honest_step()

    async def main() -> Audited:
        config = AuditConfig(attempts=2, answer_s=5.0)
        async with scene(done, 1, serve=serve, config=config, own=own) as here:
            return await here.auditor.audit(lot(1, index), done.receipts, done.commitments[1])

    return run_virtual(main)


def refuse(request: dict[str, Any], head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    raise Refused("I do not feel like it", rule="mood")


def bend_message(request: dict[str, Any], head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    return head, body[:-1] + bytes([body[-1] ^ 1])


def bend_hash(request: dict[str, Any], head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    return head, bytes([body[0] ^ 1]) + body[1:]


def flood(request: dict[str, Any], head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    return head, body + bytes(10 * 2**20)


def lie_about_sizes(request: dict[str, Any], head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    return {"sizes": [2**70, "x", -1]}, body


def silence(transport: Transport, log: AuditLog) -> None:
    pass


@pytest.mark.parametrize("change", [refuse, bend_message, bend_hash, flood, lie_about_sizes])
def test_a_worker_who_shows_other_bytes_than_he_signed_withholds(change: Any) -> None:
    result = audited(answering(change))
    assert result.verdict.outcome == "withheld"
    assert result.evidence is None
    result.verdict.check()


def test_a_silent_worker_withholds_after_the_attempts_in_the_manifest() -> None:
    assert audited(silence).verdict.outcome == "withheld"


def test_parameters_that_are_not_those_he_committed_to_are_withheld() -> None:
    """The auditor's own differ, so he asks; the worker shows an earlier step's."""
    other, old = crew().workers[1], crew().run.states
    other.trainer.load(old[STEP - 1][1])
    stale = Snapshot(other.trainer.stage)

    def change(request: dict[str, Any], head: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if request["op"] != "params":
            return head, body
        packed = stale.pack()
        return {"size": len(packed)}, packed[request["offset"] :]

    assert audited(answering(change), own=stale).verdict.outcome == "withheld"


def test_committing_to_stale_parameters_openly_fails_on_their_drift() -> None:
    """He works with, and commits to, what he had a step before."""
    team = crew()
    done = honest_step()
    team.workers[1].trainer.load(team.run.states[STEP - 1][1])
    fresh = done.logs[1].params(STEP)
    stale = Snapshot(team.workers[1].trainer.stage)
    assert stale.version != fresh.version
    late = team.step(STEP)
    late.logs[1]._steps[STEP].params = stale
    late.commitments[1] = late.logs[1].commit(STEP, worker_key(1), late.logs[1].update(STEP))
    late.receipts[:] = [
        replace(r, version=stale.version).signed_by(worker_key(1)) if r.signer == worker_key(1).id else r
        for r in late.receipts
    ]

    async def main() -> Audited:
        async with scene(late, 1, own=fresh) as here:
            return await here.auditor.audit(lot(1), late.receipts, late.commitments[1])

    verdict = run_virtual(main).verdict
    assert (verdict.outcome, verdict.reason.split(":")[0]) == ("failed", "version")


def test_a_neighbour_cannot_frame_a_worker_by_signing_what_he_never_sent() -> None:
    """Stage 2 signs garbage as the honest worker's code. The receipt counts for nobody and proves nothing."""
    done = crew().step(STEP)
    garbage = {i: bytes(32) for i in range(MICROBATCHES)}
    forward = next(r for r in done.receipts if r.worker == worker_key(1).id and r.direction == "forward")
    framed = replace(forward, digest=payloads_digest(garbage)).signed_by(worker_key(2))
    receipts = [framed if r is forward else r for r in done.receipts]
    assert framed not in accepted(receipts, done.commitments)
    evidence = done.evidence(1, 0)
    flows = tuple(
        replace(f, receipt=framed, hashes=tuple(garbage.values()), payloads={}) if f.receipt is forward else f
        for f in evidence.flows
    )
    with pytest.raises(Invalid, match="does not name a receipt"):
        replace(evidence, flows=flows).check(1, 3, done.run.stage_of)


def change_flow(evidence: Evidence, **changes: Any) -> Evidence:
    first, *rest = evidence.flows
    return replace(evidence, flows=(replace(first, **changes), *rest))


def strange_evidence(done: Step) -> dict[str, Evidence]:
    """What a lying auditor might show."""
    true = done.evidence(1, 0)
    receipt: Any = true.flows[0].receipt
    stranger = PeerKey(bytes([9]) * 32)
    payload = true.flows[0].payloads[0]
    return {
        "a message that was not sent": change_flow(true, payloads={0: payload[:-1] + bytes([payload[-1] ^ 1])}),
        "other hashes": change_flow(true, hashes=(bytes(32),) * MICROBATCHES),
        "too few hashes": change_flow(true, hashes=()),
        "a forged receipt": change_flow(true, receipt=replace(receipt, microbatches=(0, 1))),
        "a stranger's receipt": change_flow(
            true, receipt=replace(receipt, worker=stranger.id).signed_by(worker_key(1))
        ),
        "a receipt of another step": change_flow(
            true, receipt=replace(receipt, step=STEP + 1).signed_by(worker_key(1))
        ),
        "no receipts": replace(true, flows=()),
        "one receipt less": replace(true, flows=true.flows[1:]),
        "another's commitment": replace(true, commitment=done.commitments[0]),
        "a forged commitment": replace(true, commitment=replace(true.commitment, version=bytes(32))),
        "another's draw": replace(true, draw=lot(0)),
        "a forged draw": replace(true, draw=replace(true.draw, index=1)),
        "a draw by another stage": replace(true, draw=replace(lot(1), auditor=auditor_key(0).id)),
        "a microbatch that does not exist": done.evidence(1, 999),
        "an update without its gradient": replace(done.evidence(1, None), gradient=None),
        "an update with another gradient": replace(done.evidence(1, None), gradient=b"x"),
    }


@pytest.mark.parametrize("name", strange_evidence(honest_step()))
def test_evidence_that_does_not_hold_together_accuses_nobody(name: str) -> None:
    done = honest_step()
    with pytest.raises((Invalid, Misbehaviour)):
        judge(strange_evidence(done)[name], replayer(done, 1), stage_of=done.run.stage_of, ids=done.run.ids)


def test_evidence_with_other_parameters_accuses_nobody() -> None:
    done = honest_step()
    team = crew()
    team.workers[1].trainer.load(team.run.states[STEP - 1][1])
    seen = replayer(done, 1)
    seen.load(Snapshot(team.workers[1].trainer.stage))
    with pytest.raises(Invalid, match="replay nothing that names"):
        judge(done.evidence(1, 0), seen, stage_of=done.run.stage_of, ids=done.run.ids)


@pytest.mark.parametrize("cut", [0, 3, 4, 40, -1])
def test_torn_evidence_is_refused(cut: int) -> None:
    data = honest_step().evidence(1, 0).to_bytes()
    with pytest.raises(Invalid):
        Evidence.from_bytes(RUN, data[:cut], Receipt.from_row)


def test_a_stranger_gets_no_parameters() -> None:
    done = honest_step()

    async def main() -> None:
        async with scene(done, 1) as here:
            request = {"op": "params", "step": STEP, "offset": 0}
            with pytest.raises(Refused, match="only workers of this stage"):
                await call(here.stranger, here.worker.record(), AUDIT, request, timeout_s=5, reply_limit=1 << 23)

    run_virtual(main)


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "params", "step": -1, "offset": 0},
        {"op": "params", "step": STEP, "offset": 2**80},
        {"op": "params", "step": True, "offset": 0},
        {"op": "payloads", "step": STEP, "role": "secrets", "of": [0], "indices": [0]},
        {"op": "payloads", "step": STEP, "role": "code_in", "of": [0, 0], "indices": []},
        {"op": "payloads", "step": STEP, "role": "code_in", "of": list(range(2000)), "indices": []},
        {"op": "payloads", "step": STEP, "role": "code_in", "of": "all", "indices": []},
        {"op": "everything", "step": STEP},
        {"step": STEP},
    ],
)
def test_a_bad_question_gets_a_clear_answer(request_: dict[str, Any]) -> None:
    done = honest_step()

    async def main() -> None:
        async with scene(done, 1) as here:
            with pytest.raises(Invalid):
                await call(
                    here.auditor._transport, here.worker.record(), AUDIT, request_, timeout_s=5, reply_limit=1 << 23
                )

    run_virtual(main)


# --- what verdicts do -------------------------------------------------------------------------------------------------


WORKER = worker_key(1).id
AUDITORS = [auditor_key(1, number) for number in range(3)]
WORK = {WORKER: {(STEP, index) for index in range(4)} | {(STEP - 1, 0)}}


def verdict(key: PeerKey, outcome: Any, index: int | None = 0) -> Verdict:
    from tessera.training.audit import draw

    return Verdict(draw(key, RUN, STEP, WORKER, index), outcome, outcome, bytes(32)).signed_by(key)


def test_one_of_three_auditors_cannot_take_a_workers_credit() -> None:
    everybody = {WORKER: [key.id for key in AUDITORS]}
    lies = [verdict(AUDITORS[0], "failed"), verdict(AUDITORS[0], "withheld"), verdict(AUDITORS[0], "failed", 1)]
    credit = settle_credit(WORK, lies, everybody, AuditConfig())
    assert credit.paid[WORKER] == WORK[WORKER]
    assert not credit.withheld[WORKER]


def test_strangers_verdicts_count_for_nothing() -> None:
    everybody = {WORKER: [AUDITORS[0].id]}
    lies = [verdict(key, "failed") for key in (AUDITORS[1], AUDITORS[2], auditor_key(0))]
    assert settle_credit(WORK, lies, everybody, AuditConfig()).paid[WORKER] == WORK[WORKER]


def test_a_forged_verdict_is_evidence_against_its_bearer() -> None:
    forged = replace(verdict(AUDITORS[0], "passed"), outcome="failed")
    with pytest.raises(Misbehaviour, match="forged"):
        forged.check()


def test_a_worker_cannot_judge_himself() -> None:
    with pytest.raises(Misbehaviour, match="nobody audits himself"):
        verdict(worker_key(1), "passed").check()


@pytest.mark.parametrize(("penalty", "left"), [("microbatch", 4), ("step", 1), ("epoch", 0)])
def test_a_convicted_worker_loses_what_the_manifest_says(penalty: Any, left: int) -> None:
    everybody = {WORKER: [key.id for key in AUDITORS]}
    found = [verdict(AUDITORS[0], "failed"), verdict(AUDITORS[1], "withheld"), verdict(AUDITORS[2], "passed")]
    credit = settle_credit(WORK, found, everybody, AuditConfig(penalty=penalty))
    assert len(credit.paid[WORKER]) == left
    assert len(credit.withheld[WORKER]) == len(WORK[WORKER]) - left
