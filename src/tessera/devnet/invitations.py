"""Invitations to a run that is hosted here: made, kept, listed and taken back, also while the host is at work.

The host's seat book is the truth: an invitation opens a seat as long as it stands there.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Missing
from tessera.core.ids import RunId
from tessera.p2p.relay.url import RelayUrl
from tessera.p2p.transport import PeerRecord
from tessera.training.book import SeatBook
from tessera.training.home import Home, write_atomic
from tessera.training.invitation import Invitation

__all__ = ["INVITATION_S", "Door", "keep_invitation", "last_invitation"]

INVITATION_S = 7 * 24 * 3600
FILE = "invitation"


@dataclass(frozen=True)
class Door:
    """What invitations to one run open, and where they are written down."""

    home: Home
    book: SeatBook
    run_id: RunId
    chain_id: int
    host: PeerRecord
    clock: Clock
    relays: tuple[RelayUrl, ...] = ()

    def invite(self, seats: int, *, lasts_s: int = INVITATION_S, label: str = "") -> Invitation:
        """A new invitation, in the seat book before anybody sees it."""
        invitation = Invitation.make(
            self.home.peer_key,
            self.run_id,
            chain_id=self.chain_id,
            host=self.host,
            expires=int(self.clock.time()) + lasts_s,
            seats=seats,
            relays=self.relays,
        )
        self.book.save_invitation(invitation.id, seats, invitation.expires, label)
        return invitation

    def standing(self, seats: int) -> Invitation:
        """The one that this directory gave before, if it still leads here; else a new one, kept for the next time."""
        try:
            kept = last_invitation(self.home, self.clock)
            if self._leads_here(kept) and kept.seats == seats:
                return kept
        except (Missing, Invalid):  # none, or expired
            pass
        fresh = self.invite(seats, label="first")
        keep_invitation(self.home, fresh)
        return fresh

    def _leads_here(self, kept: Invitation) -> bool:
        known = self.book.invitation(kept.id)
        same = (kept.run_id, kept.host.addrs, kept.relays) == (self.run_id, self.host.addrs, self.relays)
        return same and known is not None and not known.revoked


def keep_invitation(home: Home, invitation: Invitation) -> None:
    """It may hold a relay's token: only the owner of the directory may read it."""
    write_atomic(home.path / FILE, invitation.to_text().encode(), mode=0o600)


def last_invitation(home: Home, clock: Clock, *, even_expired: bool = False) -> Invitation:
    """The invitation that lies in this directory: given here, or joined with. Raises `Missing`, `Invalid`."""
    try:
        text = (home.path / FILE).read_text()
    except FileNotFoundError as error:
        raise Missing(f"{home.path} holds no invitation: join a run, or host one, first") from error
    return Invitation.parse(text, clock, even_expired=even_expired)
