"""Whatever makers do in whatever order, a shelf keeps to its room, to the newest two, and to one past of the run."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tessera.core.errors import Conflict, Misbehaviour, Missing, Refused
from tessera.core.hashing import sha256
from tessera.core.ids import RunId
from tessera.training.snapshot_code import share_hash
from tessera.training.snapshot_header import TAG, Moment, Piece, SnapshotHeader, is_overtaken
from tessera.training.snapshot_shelf import KEPT, Shelf
from training_world import peer_keys

MAKER, OWNER, OTHER = peer_keys(3)
STAGE_BYTES = 1000
sizes = st.sampled_from([400, 334, 450, 500, 501, 9])  # of a fragment, bytes


class ShelfMachine(RuleBasedStateMachine):
    """Two stages' makers and one holder, who restarts now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="tessera-shelf-"))
        self.shelf = Shelf(self.folder, peer=OWNER.id, stage_bytes=STAGE_BYTES)
        self.begun: dict[str, tuple[SnapshotHeader, bytes]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(stage=st.integers(0, 1), session=st.integers(1, 3), step=st.integers(1, 6), size=sizes)
    def begin(self, stage: int, session: int, step: int, size: int) -> None:
        fragment = bytes([stage, session, step]) * size
        fragment = fragment[:size]
        pieces = (Piece(OTHER.id, "00" * 32, "00" * 32), Piece(OWNER.id, sha256(fragment).hex(), share_hash("w")))
        header = SnapshotHeader(
            RunId("ab" * 32), stage, session, step, 2 * size - TAG, "00" * 32, 2, pieces, MAKER.id
        ).signed_by(MAKER)
        try:
            self.shelf.begin(header, "w")
        except Refused:
            assert size > STAGE_BYTES // 2
        except Conflict:
            assert size <= STAGE_BYTES // 2
        else:
            self.begun[header.digest] = header, fragment

    @rule(stage=st.integers(0, 1), step=st.integers(1, 6), size=sizes)
    def keep(self, stage: int, step: int, size: int) -> None:
        """A whole snapshot at once, as most are."""
        self.begin(stage=stage, session=2, step=step, size=size)
        for header, fragment in list(self.begun.values()):
            if (header.stage, header.session, header.step, len(fragment)) == (stage, 2, step, size):
                with suppress(Conflict):
                    have, whole = self.shelf.begin(header, "w")
                    assert whole or self.shelf.write(MAKER.id, header.digest, have, fragment[have:])[1]

    @precondition(lambda self: self.begun)
    @rule(data=st.data(), size=st.integers(1, 600), spoil=st.booleans())
    def write(self, data: st.DataObject, size: int, spoil: bool) -> None:
        header, fragment = self.begun[data.draw(st.sampled_from(sorted(self.begun)))]
        try:
            have, whole = self.shelf.begin(header, "w")
        except Conflict:
            return
        if whole:
            assert self.shelf.read(header.digest, 0, STAGE_BYTES) == ("w", fragment)
            return
        chunk = fragment[have : have + size]
        last = have + len(chunk) == len(fragment)
        if spoil and last:
            chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
        try:
            assert self.shelf.write(MAKER.id, header.digest, have, chunk) == (have + len(chunk), last)
        except Misbehaviour:
            assert spoil
            assert last
        except Missing:
            raise AssertionError("it was begun just now") from None

    @rule(session=st.integers(1, 3), step=st.integers(0, 6))
    def go_back(self, session: int, step: int) -> None:
        before = self.shelf.headers()
        self.shelf.drop_after(Moment(session, step))
        assert self.shelf.headers() == [h for h in before if h.session >= session or h.step <= step]

    @rule()
    def restart(self) -> None:
        before = [self.shelf.headers(stage) for stage in range(2)]
        self.shelf = Shelf(self.folder, peer=OWNER.id, stage_bytes=STAGE_BYTES)
        assert [self.shelf.headers(stage) for stage in range(2)] == before

    @invariant()
    def each_stage_keeps_to_its_room_and_to_one_past(self) -> None:
        for stage in range(2):
            headers = self.shelf.headers(stage)
            moments = [header.moment for header in headers]
            assert len(headers) <= KEPT
            assert len(set(moments)) == len(moments)
            assert moments == sorted(moments, reverse=True)
            assert not any(is_overtaken(moment, moments) for moment in moments)

    @invariant()
    def the_disk_holds_what_the_table_says(self) -> None:
        names = {file.name for file in self.folder.iterdir()}
        whole = {header.digest for header in self.shelf.headers()}
        assert {name.removesuffix(".data") for name in names if name.endswith(".data")} == whole
        parts = {name.removesuffix(".part") for name in names if name.endswith(".part")}
        assert {name.removesuffix(".head") for name in names if name.endswith(".head")} == whole | parts
        assert len(names) == 2 * (len(whole) + len(parts))
        for stage in range(2):
            mine = [header for digest, (header, _) in self.begun.items() if digest in whole | parts]
            held = [header.fragment_bytes for header in mine if header.stage == stage]
            assert sum(held) <= STAGE_BYTES
            assert len([h for h in mine if h.stage == stage and h.digest in parts]) <= 1


ShelfMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestShelf = ShelfMachine.TestCase
