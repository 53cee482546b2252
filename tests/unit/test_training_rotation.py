"""A boundary's secret: who can make, open and use it, and when the boundary turns."""

import numpy as np
import pytest

from tessera.core import encoding
from tessera.core.errors import Invalid, Missing, Refused
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.models.presets import tiny_spec
from tessera.models.trainer import StageTrainer
from tessera.training.rotation import DOMAIN, SEALED_SECRET_LIMIT, BoundarySecret, turn_after_step

RUN = RunId("ab" * 32)
maker, owner, attacker = (PeerKey(bytes([n]) * 32) for n in (1, 2, 3))


def secret(boundary: int = 0, since: int = 0) -> BoundarySecret:
    return BoundarySecret(RUN, boundary, since, bytes([boundary + 1, since + 1]) * 16)


def changed(data: bytes, signer: PeerKey | None = None, **fields: object) -> bytes:
    """The message with other fields; signed anew by `signer`."""
    value = encoding.decode(data, SEALED_SECRET_LIMIT) | fields
    if signer is not None:
        signature = value.pop("signature")
        value["signature"] = signer.sign(DOMAIN, encoding.encode(value)).hex()
        assert value["signature"] != signature
    return encoding.encode(value)


# --- sealing ----------------------------------------------------------------------------------------------------------


def test_every_owner_opens_the_same_secret() -> None:
    made = BoundarySecret.create(RUN, 3, 7)
    for peer in (owner, maker):
        data = made.seal(peer.id, maker)
        assert len(data) <= SEALED_SECRET_LIMIT
        assert BoundarySecret.open(data, peer, {maker.id}) == made
    assert made.seal(owner.id, maker) != made.seal(owner.id, maker), "a box has a key of its own"
    assert made.key != BoundarySecret.create(RUN, 3, 7).key
    assert made.key.hex() not in repr(made)
    assert str(made.key) not in repr(made)


def test_a_fingerprint_names_the_secret_and_its_place() -> None:
    prints = {s.fingerprint for s in (secret(), secret(1), secret(0, 1), BoundarySecret(RUN, 0, 0, bytes(32)))}
    assert len(prints) == 4
    assert secret().key.hex() not in secret().fingerprint


def test_nobody_else_opens_it() -> None:
    data = secret().seal(owner.id, maker)
    with pytest.raises(Invalid, match="another peer"):
        BoundarySecret.open(data, attacker, {maker.id})
    readdressed = changed(data, maker, to=attacker.id)  # even if the maker himself helps
    with pytest.raises(Invalid, match="another key than ours"):
        BoundarySecret.open(readdressed, attacker, {maker.id})


def test_a_stranger_makes_no_secret() -> None:
    data = secret().seal(owner.id, attacker)
    with pytest.raises(Refused) as refusal:
        BoundarySecret.open(data, owner, {maker.id})
    assert refusal.value.rule == "boundary-owner"
    with pytest.raises(Invalid, match="signature"):
        BoundarySecret.open(changed(data, by=maker.id), owner, {maker.id})


@pytest.mark.parametrize("field", [{"boundary": 1}, {"since": 1}, {"run": "cd" * 32}, {"sealed": "00" * 80}])
def test_a_secret_moves_to_no_other_place(field: dict[str, object]) -> None:
    with pytest.raises(Invalid, match="signature"):
        BoundarySecret.open(changed(secret().seal(owner.id, maker), **field), owner, {maker.id})


@pytest.mark.parametrize(
    "field",
    [
        {"boundary": -1}, {"boundary": 2**40}, {"boundary": True}, {"boundary": "0"}, {"since": -1}, {"since": None},
        {"run": "ab"}, {"sealed": "00" * 79}, {"sealed": "zz" * 80}, {"sealed": 5}, {"extra": 1}, {"by": 7},
        {"by": "x"},
    ],
)  # fmt: skip
def test_even_the_maker_cannot_send_nonsense(field: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        BoundarySecret.open(changed(secret().seal(owner.id, maker), maker, **field), owner, {maker.id})


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff" * 50, b"1" * 5000, encoding.encode({"by": "x"})])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        BoundarySecret.open(data, owner, {maker.id})


def test_every_changed_byte_is_noticed() -> None:
    data = secret().seal(owner.id, maker)
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 1
        with pytest.raises((Invalid, Refused)):
            BoundarySecret.open(bytes(broken), owner, {maker.id})


def test_a_peer_that_is_no_key_gets_nothing() -> None:
    with pytest.raises(Invalid, match="no ed25519 key"):
        secret().seal(PeerId("00" * 32), maker)
    with pytest.raises(Invalid, match="32 bytes, not 3"):
        BoundarySecret(RUN, 0, 0, b"abc")


# --- turning ----------------------------------------------------------------------------------------------------------


def trained(stage: int, known: list[BoundarySecret], steps: int, every: int = 2) -> tuple[StageTrainer, list[int]]:
    """A stage after some steps over nothing but zeros, and the steps at which it turned."""
    trainer, turned = StageTrainer(tiny_spec(3), stage, steps=20), []
    ids = np.zeros((1, 5), np.int64)
    payload = bytes(trainer.payload_limit(1, 4))
    for step in range(steps):
        trainer.forward(step, 0, ids, None if stage == 0 else payload)
        trainer.backward(step, 0, payload if stage < 2 else None)
        trainer.finish_step(step, 4)
        if turn_after_step(trainer, RUN, known, every) is not None:
            turned.append(step)
    return trainer, turned


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_turns_every_so_many_steps(stage: int) -> None:
    known = [secret(0), secret(1)]
    turning, turned = trained(stage, known, 5)
    assert turned == [1, 3]
    assert turning.save() == trained(stage, known, 5)[0].save(), "replicas stay equal"
    assert turning.save() != trained(stage, known, 5, every=0)[0].save()
    assert trained(stage, known, 5, every=0)[1] == []


def test_a_checkpoint_knows_how_often_it_has_turned() -> None:
    known = [secret(0), secret(1)]
    straight, _ = trained(1, known, 4)
    halfway, _ = trained(1, known, 2)
    again = StageTrainer(tiny_spec(3), 1, steps=20)
    again.load(halfway.save())
    ids, payload = np.zeros((1, 5), np.int64), bytes(again.payload_limit(1, 4))
    for step in (2, 3):
        again.forward(step, 0, ids, payload)
        again.backward(step, 0, payload)
        again.finish_step(step, 4)
        turn_after_step(again, RUN, known, 2)
    assert again.save() == straight.save()


def test_a_new_secret_is_used_from_its_epoch_on() -> None:
    renewed = [secret(0), BoundarySecret(RUN, 0, 2, bytes(32)), secret(1)]
    assert trained(0, renewed, 3)[0].save() == trained(0, [secret(0)], 3)[0].save()
    assert trained(0, renewed, 4)[0].save() != trained(0, [secret(0)], 4)[0].save()


def test_a_missing_secret_turns_nothing() -> None:
    late = [secret(0), BoundarySecret(RUN, 1, 2, bytes(32)), BoundarySecret(RunId("cd" * 32), 1, 0, bytes(32))]
    trainer, _ = trained(1, late, 1)
    before = trainer.save()
    with pytest.raises(Missing, match="boundary 1 for epoch 1"):
        turn_after_step(trainer, RUN, late, 1)
    assert trainer.save() == before
    with pytest.raises(Invalid, match="not -1"):
        turn_after_step(trainer, RUN, late, -1)
