"""An open run: everything that the economy holds of it, from its manifest to the last payment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tessera.core.errors import Conflict
from tessera.core.ids import Account
from tessera.core.signing import PeerKey
from tessera.devnet.board import Board
from tessera.devnet.books import Books, Figures
from tessera.devnet.ledger import Ledger
from tessera.devnet.people import People
from tessera.devnet.tables import RunTables
from tessera.devnet.text import Text
from tessera.p2p.blobs import BlobStore
from tessera.p2p.transport import Transport
from tessera.training.book import ReceiptBook
from tessera.training.host import RunHost
from tessera.training.manifest import Manifest
from tessera.training.roster import Roster, remember_run

__all__ = ["Run"]


@dataclass
class Run:
    """What is known from the start, and what comes with the seats: roster, share contract and books."""

    manifest: Manifest
    folder: Path
    tables: RunTables
    params: int  # numbers in the whole model
    ledger: Ledger
    coin: Account
    people: People
    text: Text
    blobs: BlobStore
    peer_key: PeerKey = field(repr=False)  # the host's, who is the gateway too
    transport: Transport
    host: RunHost
    board: Board
    book: ReceiptBook
    invitation: str
    open_seats: int  # that others are to take before it starts
    samples: list[tuple[str, str]] = field(default_factory=list)  # prompt, answer
    seated: tuple[Roster, Books] | None = None
    paused: bool = False  # as its host's owner wishes

    def seat(self, roster: Roster) -> None:
        """All seats are taken and the share contract stands."""
        remember_run(self.folder, self.manifest, roster)
        books = Books(self.ledger.chain, self.manifest, roster, self.transport, self.book, self._holders(roster))
        self.seated = (roster, books)
        self.board.note(f"the share contract stands at {roster.share}")

    def follow(self) -> None:
        """Take note of who came and went."""
        roster, books = self._seated()
        present = self.host.roster()
        if present != roster:
            remember_run(self.folder, self.manifest, present)
            books.follow(present, self._holders(present))
            self.seated = (present, books)
            known = {seat.peer for seat in roster.everyone}
            for seat in present.seats:
                if seat.peer not in known:
                    self.board.note(f"{seat.peer[:8]}… works at stage {seat.stage} from now on")
            for seat in present.past[len(roster.past) :]:
                self.board.note(f"{seat.peer[:8]}… has left stage {seat.stage}")

    @property
    def absent(self) -> list[Account]:
        """Holders who run no process here: the owners, and who has left."""
        return self._absent(self.roster)

    def _holders(self, roster: Roster) -> list[Account]:
        """Whose shares and income are looked up."""
        return [*roster.accounts, *self._absent(roster)]

    def _absent(self, roster: Roster) -> list[Account]:
        gone = [seat.account for seat in roster.past]
        return list(dict.fromkeys([*(owner.account for owner in self.manifest.owners), *gone]))

    @property
    def roster(self) -> Roster:
        return self._seated()[0]

    @property
    def books(self) -> Books:
        return self._seated()[1]

    @property
    def figures(self) -> Figures:
        """What the chain says so far; nothing before the seats are taken."""
        return self.books.figures if self.seated else Figures()

    @property
    def pay_to(self) -> Account:
        """Who is paid by buyers."""
        return self.manifest.payee(self.roster.share)

    def _seated(self) -> tuple[Roster, Books]:
        if self.seated is None:
            raise Conflict("not all seats of this run are taken yet")
        return self.seated
