"""How two peers find out what the other lacks, in a few small messages: comparing fingerprints of ranges.

Slots are ordered as bytes. A range of slots has a fingerprint, 16 bytes that depend on which ids are in it. One side
asks with ranges and its fingerprints; for each the other answers that it has the same, or lists its ids when they are
few, or cuts the range into smaller ones with its own fingerprints, of which those that differ are asked next. Equal
sets cost one message each way; d differences among n ids cost about d · log16(n) ranges.

    element(id)  = SHA-256(id)                                     as a big-endian integer
    fingerprint  = SHA-256(count, 8 bytes ‖ Σ element mod 2^256, 32 bytes)[:16]

A member that lies here wastes our rounds, which are bounded; what it claims to have it must deliver. To make two
different sets look equal, an attacker must find ids with a given sum mod 2^256 within its allowance of items; whoever
else compares with us does not depend on it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.p2p.flood_item import ID_BYTES, SLOT_BYTES

__all__ = ["ANSWER_LIMIT", "ASK_LIMIT", "Reconciliation", "SlotIndex", "answer_ranges", "split_ids"]

PRINT_BYTES = 16
RANGE_BYTES = 2 * SLOT_BYTES + PRINT_BYTES
MAX_RANGES = 64  # in one question
PARTS = 16  # that a range is cut into
FEW = 32  # ids that are listed rather than cut
MAX_ASKS = 64  # of one reconciliation
MAX_TODO = 4096  # ranges that wait to be asked: a liar could cut for ever
ASK_LIMIT = MAX_RANGES * RANGE_BYTES
ANSWER_LIMIT = MAX_RANGES * (3 + max(PARTS * RANGE_BYTES, FEW * ID_BYTES))
LOWEST, HIGHEST = bytes(SLOT_BYTES), b"\xff" * SLOT_BYTES  # no sequence reaches 2^64 - 1
SAME, LIST, CUT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Range:
    """The slots from `low` up to, not including, `high`."""

    low: bytes
    high: bytes
    fingerprint: bytes

    def to_bytes(self) -> bytes:
        return self.low + self.high + self.fingerprint


class SlotIndex:
    """The ids that are held, in order.

    Cost: O(log n) to find, O(n) memory moves to insert; a fingerprint adds up the range, about 0.1 µs for each id,
    but that of everything is kept.
    """

    def __init__(self) -> None:
        self._order: list[bytes] = []
        self._marks: dict[bytes, bytes] = {}
        self._elements: dict[bytes, int] = {}
        self._sum = 0

    def __len__(self) -> int:
        return len(self._order)

    def put(self, slot: bytes, mark: bytes) -> None:
        """From now on `slot` holds `mark`."""
        if slot in self._marks:
            self._sum -= self._elements[slot]
        else:
            insort(self._order, slot)
        self._marks[slot] = mark
        self._elements[slot] = int.from_bytes(sha256(slot, mark), "big")
        self._sum += self._elements[slot]

    def discard(self, slot: bytes) -> None:
        if slot in self._marks:
            del self._order[bisect_left(self._order, slot)]
            del self._marks[slot]
            self._sum -= self._elements.pop(slot)

    def slots(self, low: bytes, high: bytes) -> list[bytes]:
        return self._order[bisect_left(self._order, low) : bisect_left(self._order, high)]

    def first(self, low: bytes) -> bytes | None:
        """The lowest slot from `low` on."""
        place = bisect_left(self._order, low)
        return self._order[place] if place < len(self._order) else None

    def ids(self, low: bytes = LOWEST, high: bytes = HIGHEST) -> list[bytes]:
        return [slot + self._marks[slot] for slot in self.slots(low, high)]

    def fingerprint(self, low: bytes = LOWEST, high: bytes = HIGHEST) -> bytes:
        if (low, high) == (LOWEST, HIGHEST):
            count, total = len(self._order), self._sum
        else:
            slots = self.slots(low, high)
            count, total = len(slots), sum(map(self._elements.__getitem__, slots))
        return sha256(count.to_bytes(8, "big"), (total % 2**256).to_bytes(32, "big"))[:PRINT_BYTES]

    def cut(self, low: bytes, high: bytes) -> list[bytes]:
        """Bounds that cut a range of more than `FEW` ids into `PARTS` ranges of about as many each, ends included."""
        slots = self.slots(low, high)
        inner = (slots[len(slots) * part // PARTS] for part in range(1, PARTS))
        return [low, *inner, high]


def answer_ranges(index: SlotIndex, question: bytes) -> bytes:
    """What to say to a peer's `Reconciliation.ask`.

    For each range one byte, 0 same · 1 list · 2 cut; the latter two go on with a count, 2 bytes, and as many ids or
    ranges. Raises `Invalid` for a question that no honest peer asks.
    """
    parts = []
    for wanted in _read_ranges(question, most=MAX_RANGES):
        slots = index.slots(wanted.low, wanted.high)
        if index.fingerprint(wanted.low, wanted.high) == wanted.fingerprint:
            parts.append(bytes([SAME]))
        elif len(slots) <= FEW:
            parts.append(_counted(LIST, index.ids(wanted.low, wanted.high)))
        else:
            bounds = index.cut(wanted.low, wanted.high)
            parts.append(_counted(CUT, [piece.to_bytes() for piece in _pieces(index, bounds)]))
    return b"".join(parts)


class Reconciliation:
    """One comparison with one peer, as whoever asks: `ask`, send it, `hear` the answer, until `ask` says None.

    `missing` is what the peer listed and we lacked when it answered; `surplus` what we held and it did not list. After
    `MAX_ASKS` questions, or `most` ids on either list, it ends early: compare again after fetching those.
    """

    def __init__(self, index: SlotIndex, *, most: int) -> None:
        self._index, self._most = index, most
        self._todo = deque([(LOWEST, HIGHEST)])
        self._asked: list[_Range] = []
        self._asks = 0
        self._cut_off = False
        self.missing: list[bytes] = []
        self.surplus: list[bytes] = []

    @property
    def whole(self) -> bool:
        """Whether everything was compared, and neither list is longer than `most`."""
        return not (self._todo or self._cut_off) and max(len(self.missing), len(self.surplus)) <= self._most

    def ask(self) -> bytes | None:
        """The next question, of at most `ASK_LIMIT` bytes."""
        full = max(len(self.missing), len(self.surplus)) >= self._most
        if not self._todo or self._asks == MAX_ASKS or full:
            return None
        self._asks += 1
        bounds = [self._todo.popleft() for _ in range(min(MAX_RANGES, len(self._todo)))]
        self._asked = [_Range(low, high, self._index.fingerprint(low, high)) for low, high in bounds]
        return b"".join(asked.to_bytes() for asked in self._asked)

    def hear(self, answer: bytes) -> None:
        """Raises `Invalid` for an answer that no honest peer gives."""
        reader = _Reader(answer)
        for asked in self._asked:
            kind = reader.byte()
            if kind == LIST:
                self._compare(asked, split_ids(reader.counted(ID_BYTES, FEW)))
            elif kind == CUT:
                self._descend(asked, _read_ranges(reader.counted(RANGE_BYTES, PARTS), most=PARTS))
            elif kind != SAME:
                raise Invalid(f"an answer about a range is 0, 1 or 2, not {kind}")
        reader.end()

    def _compare(self, asked: _Range, ids: list[bytes]) -> None:
        if any(not asked.low <= id[:SLOT_BYTES] < asked.high for id in ids) or ids != sorted(set(ids)):
            raise Invalid("a list of ids is ascending and within its range")
        mine, theirs = self._index.ids(asked.low, asked.high), set(ids)
        held = set(mine)
        self.missing += [id for id in ids if id not in held]
        self.surplus += [id for id in mine if id not in theirs]

    def _descend(self, asked: _Range, pieces: list[_Range]) -> None:
        bounds = [asked.low, *(piece.high for piece in pieces)]
        if bounds[-1] != asked.high or [piece.low for piece in pieces] != bounds[:-1] or len(pieces) < 2:
            raise Invalid("a range is cut into at least two that fill it")
        for piece in pieces:
            differs = self._index.fingerprint(piece.low, piece.high) != piece.fingerprint
            if differs and len(self._todo) == MAX_TODO:
                self._cut_off = True
            elif differs:
                self._todo.append((piece.low, piece.high))


def split_ids(body: bytes) -> list[bytes]:
    """Raises `Invalid` for a length that is no multiple of an id's."""
    if len(body) % ID_BYTES:
        raise Invalid(f"ids have {ID_BYTES} bytes each, {len(body)} bytes are no list of them")
    return [body[start : start + ID_BYTES] for start in range(0, len(body), ID_BYTES)]


def _pieces(index: SlotIndex, bounds: Sequence[bytes]) -> Iterator[_Range]:
    for low, high in pairwise(bounds):
        yield _Range(low, high, index.fingerprint(low, high))


def _read_ranges(body: bytes, *, most: int) -> list[_Range]:
    if len(body) % RANGE_BYTES or not 0 < len(body) <= most * RANGE_BYTES:
        raise Invalid(f"1 to {most} ranges of {RANGE_BYTES} bytes expected, not {len(body)} bytes")
    ranges = []
    for start in range(0, len(body), RANGE_BYTES):
        low, high = body[start : start + SLOT_BYTES], body[start + SLOT_BYTES : start + 2 * SLOT_BYTES]
        if low >= high:
            raise Invalid("a range begins below its end")
        ranges.append(_Range(low, high, body[start + 2 * SLOT_BYTES : start + RANGE_BYTES]))
    return ranges


def _counted(kind: int, rows: Sequence[bytes]) -> bytes:
    return b"".join((bytes([kind]), len(rows).to_bytes(2, "big"), *rows))


class _Reader:
    """Takes an answer apart."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def byte(self) -> int:
        return self._take(1)[0]

    def counted(self, size: int, most: int) -> bytes:
        count = int.from_bytes(self._take(2), "big")
        if count > most:
            raise Invalid(f"an answer lists {count}, at most {most} expected")
        return self._take(count * size)

    def end(self) -> None:
        if self._place != len(self._data):
            raise Invalid("an answer is longer than what was asked")

    def _take(self, size: int) -> bytes:
        piece = self._data[self._place : self._place + size]
        if len(piece) < size:
            raise Invalid("an answer is cut short")
        self._place += size
        return piece
