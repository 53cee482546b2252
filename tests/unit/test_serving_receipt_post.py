"""Receipts on their way: whose arrive, whose are refused, and what becomes of those that nobody takes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from chain_support import RUN_ID
from gate_world import session
from serving_peers import open_peers, peer_key
from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour, Refused, TesseraError
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call
from tessera.p2p.transport import Transport
from tessera.serving.income.receipt_post import BATCH, OUTBOX, PROTOCOL, TRIES, ReceiptPost, serve_receipts
from tessera.serving.income.receipts import Receipt

pytestmark = pytest.mark.anyio
GATEWAY, WORKER, OTHER = (peer_key(number) for number in range(3))


def rows(signer: PeerKey, count: int) -> bytes:
    return encoding.encode([Receipt(RUN_ID, session(0), WORKER.id, signer.id, 5).signed_by(signer).to_row()] * count)


@pytest.fixture
async def peers() -> AsyncIterator[list[Transport]]:
    async with open_peers(3, real=False) as (_, transports):
        yield transports


async def test_a_batch_arrives_where_it_belongs(peers: list[Transport]) -> None:
    taken: list[Receipt] = []
    serve_receipts(peers[1], RUN_ID, taken.append)
    kept: list[Receipt] = []
    post = ReceiptPost(peers[0], GATEWAY, RUN_ID, lambda: [peers[1].record()], keep=kept.extend)
    for number in range(BATCH + 10):
        post.sign(session(number), WORKER.id, 5)
    post.sign(session(0), OTHER.id, 5)  # whom we do not know how to reach
    await post.flush()
    assert taken == kept[:-1]
    assert post.waiting == 0


async def test_a_gateways_go_to_every_worker(peers: list[Transport]) -> None:
    taken: list[Receipt] = []
    for worker in peers[1:]:
        serve_receipts(worker, RUN_ID, taken.append)
    post = ReceiptPost(peers[0], GATEWAY, RUN_ID, lambda: [peer.record() for peer in peers], everybody=True)
    post.sign(session(0), WORKER.id, 5)
    await post.flush()
    assert [receipt.worker for receipt in taken] == [WORKER.id] * 2


async def test_what_nobody_takes_is_tried_again_and_then_dropped(peers: list[Transport]) -> None:
    post = ReceiptPost(peers[0], GATEWAY, RUN_ID, lambda: [peers[1].record()])
    post.sign(session(0), WORKER.id, 5)
    for _ in range(TRIES - 1):
        await post.flush()
        assert post.waiting == 1
    await post.flush()
    assert post.waiting == 0


async def test_the_outbox_is_bounded(peers: list[Transport]) -> None:
    post = ReceiptPost(peers[0], GATEWAY, RUN_ID, lambda: [peer.record() for peer in peers] * 3_000, everybody=True)
    post.sign(session(0), WORKER.id, 5)
    post.sign(session(1), WORKER.id, 5)
    assert post.waiting == OUTBOX


@pytest.mark.parametrize(
    ("request_", "body", "error"),
    [
        ({"op": "receipts"}, b"{}", Invalid),
        ({"op": "receipts"}, encoding.encode([[1]]), Invalid),
        ({"op": "receipts"}, encoding.encode([[session(0), WORKER.id, GATEWAY.id, 0, "00" * 64]]), Invalid),
        ({"op": "other"}, b"[]", Invalid),
        ({"op": "receipts"}, encoding.encode([[session(0), WORKER.id, GATEWAY.id, 5, "00" * 64]]), Misbehaviour),
        ({"op": "receipts"}, rows(OTHER, 1), Refused),
        ({"op": "receipts"}, rows(GATEWAY, BATCH + 1), Invalid),
    ],
)
async def test_nothing_else_is_taken(
    peers: list[Transport], request_: dict[str, object], body: bytes, error: type[TesseraError]
) -> None:
    taken: list[Receipt] = []
    serve_receipts(peers[1], RUN_ID, taken.append)
    with pytest.raises(error):
        await call(peers[0], peers[1].record(), PROTOCOL, request_, body, timeout_s=5, reply_limit=4096)
    assert taken == []
