"""How serving receipts travel: in batches, after the sessions, protocol "tessera/serving-receipts/1".

A worker signs for whoever sent him codes, and sends it there; a gateway signs for the last stage's worker and sends it
to every worker, since each wants to see that the gateway signs. A receipt that cannot be delivered is tried again a few
times and then dropped: who lost it is paid less, and a gateway that loses many is served no more.

Invariants: the outbox is bounded; a batch is bounded; nobody hands in another's receipt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
import structlog

from tessera.core import encoding
from tessera.core.errors import Invalid, Refused, TesseraError
from tessera.core.ids import PeerId, RunId
from tessera.core.signing import PeerKey
from tessera.p2p.calls import call, serve_calls
from tessera.p2p.transport import PeerRecord, Transport
from tessera.serving.income.receipts import Receipt

__all__ = ["PROTOCOL", "ReceiptPost", "serve_receipts"]

log = structlog.get_logger()

PROTOCOL = "tessera/serving-receipts/1"
BATCH = 256  # receipts of one message
BATCH_BYTES = 512 * BATCH
OUTBOX = 8_192  # receipts not delivered yet; the oldest go first
FLUSH_S = 0.5
CALL_S = 5.0
TRIES = 5
MAX_STREAMS = 4


@dataclass
class _Letter:
    receipt: Receipt
    to: PeerId
    tries: int = 0


class ReceiptPost:
    """Signs receipts and delivers them.

    Args:
        peers: whom receipts can go to now.
        everybody: send each receipt to all of them, as a gateway does; else to the worker that it is for.
        keep: told of each receipt that we signed.
    """

    def __init__(
        self,
        transport: Transport,
        key: PeerKey,
        run_id: RunId,
        peers: Callable[[], Sequence[PeerRecord]],
        *,
        everybody: bool = False,
        keep: Callable[[Iterable[Receipt]], None] | None = None,
    ) -> None:
        self._transport, self._key, self._run_id, self._peers = transport, key, run_id, peers
        self._everybody, self._keep = everybody, keep
        self._outbox: deque[_Letter] = deque(maxlen=OUTBOX)

    @property
    def waiting(self) -> int:
        """Receipts that are not delivered yet."""
        return len(self._outbox)

    def sign(self, session: str, worker: PeerId, tokens: int) -> None:
        """`tokens` of `session` came from `worker`: it will hear so."""
        receipt = Receipt(self._run_id, session, worker, self._key.id, tokens).signed_by(self._key)
        if self._keep is not None:
            self._keep([receipt])
        to = [record.id for record in self._peers()] if self._everybody else [worker]
        self._outbox.extend(_Letter(receipt, peer) for peer in to if peer != self._key.id)

    async def run(self) -> None:
        """Delivers until cancelled."""
        while True:
            await self.flush()
            await anyio.sleep(FLUSH_S)

    async def flush(self) -> None:
        """Try once to deliver what is in the outbox."""
        letters, records = list(self._outbox), {record.id: record for record in self._peers()}
        self._outbox.clear()
        async with anyio.create_task_group() as tasks:
            for peer in dict.fromkeys(letter.to for letter in letters):
                mine = [letter for letter in letters if letter.to == peer]
                if peer in records:
                    tasks.start_soon(self._deliver, records[peer], mine)

    async def _deliver(self, record: PeerRecord, letters: list[_Letter]) -> None:
        for start in range(0, len(letters), BATCH):
            batch = letters[start : start + BATCH]
            body = encoding.encode([letter.receipt.to_row() for letter in batch])
            try:
                await call(
                    self._transport, record, PROTOCOL, {"op": "receipts"}, body, timeout_s=CALL_S, reply_limit=4096
                )
            except TesseraError as error:
                log.info("receipts_not_delivered", peer_id=record.id, count=len(batch), code=error.code)
                for letter in batch:
                    letter.tries += 1
                self._outbox.extend(letter for letter in batch if letter.tries < TRIES)


def serve_receipts(transport: Transport, run_id: RunId, take: Callable[[Receipt], None]) -> None:
    """Hand the receipts that peers send, their own only and with good signatures, to `take`."""

    async def answer(peer: PeerId, request: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if request.get("op") != "receipts":
            raise Invalid(f"unknown operation {str(request.get('op'))[:40]!r}")
        rows = encoding.decode(body, BATCH_BYTES)
        if not isinstance(rows, list) or len(rows) > BATCH:
            raise Invalid(f"a batch is a list of at most {BATCH} receipts")
        receipts = [Receipt.from_row(run_id, row) for row in rows]
        for receipt in receipts:
            if receipt.signer != peer:
                raise Refused("a receipt is handed in by who signed it", rule="signer")
            receipt.check()
        for receipt in receipts:
            take(receipt)
        return {}, b""

    serve_calls(transport, PROTOCOL, answer, request_limit=BATCH_BYTES + 4096, max_streams=MAX_STREAMS)
