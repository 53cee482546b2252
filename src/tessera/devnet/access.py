"""The chain of a run that this machine takes part in, for a command that only looks or claims.

A state directory of `tessera up` knows its chain: by URL while it is up or by its nature, else by opening the journal.
A state directory of `tessera join` asks the run's host, over a peer link of a passing identity.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tessera.chain.client import RpcChain
from tessera.chain.rpc import HttpRpc
from tessera.core.clock import SystemClock
from tessera.core.errors import Conflict, Missing, TesseraError, Unavailable
from tessera.core.ids import Account
from tessera.core.signing import PeerKey
from tessera.devnet.invitations import last_invitation
from tessera.devnet.ledger import open_ledger
from tessera.p2p.engines import engine_of, start_transport
from tessera.training.bond import recall_bond
from tessera.training.book import ReceiptBook
from tessera.training.epochs import EpochLeaves
from tessera.training.home import Home, write_atomic
from tessera.training.manifest import Manifest, load_manifest
from tessera.training.roster import Roster, recall_run
from tessera.training.rpc_link import peer_rpc

__all__ = ["OpenBond", "OpenRun", "open_bond", "open_run", "remember_urls", "up_urls"]

JOURNAL = "chain.sqlite"
URLS = "up.json"


@dataclass(frozen=True)
class OpenRun:
    """The newest run of a state directory, and a way to its chain."""

    home: Home
    manifest: Manifest
    roster: Roster
    chain: RpcChain
    leaves: list[EpochLeaves]  # of the epochs that this directory knows


@dataclass(frozen=True)
class OpenBond:
    """The newest run that a state directory has bonded in or works for, and a way to its chain.

    Attributes:
        contract: that holds the bond, if there is one.
    """

    home: Home
    folder: Path
    manifest: Manifest
    chain: RpcChain
    contract: Account | None

    def run(self) -> OpenRun:
        """Raises `Missing` when we never became its worker."""
        manifest, roster = recall_run(self.folder)
        return OpenRun(self.home, manifest, roster, self.chain, _known_epochs(self.folder, manifest))


def remember_urls(home: Home, urls: dict[str, str]) -> None:
    """Where an economy answers while it is up."""
    write_atomic(home.path / URLS, json.dumps(urls).encode())


def up_urls(state_dir: Path) -> dict[str, str]:
    """What `remember_urls` kept. Raises `Missing` when no economy ever started here."""
    try:
        return {str(key): str(value) for key, value in json.loads((state_dir / URLS).read_bytes()).items()}
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise Missing(f"no economy was started in {state_dir}: run `tessera up` first") from error


@asynccontextmanager
async def open_run(state_dir: Path) -> AsyncIterator[OpenRun]:
    """Raises `Missing` when the directory knows no run, `Unavailable` when its chain cannot be reached."""
    async with open_bond(state_dir) as bond:
        yield bond.run()


@asynccontextmanager
async def open_bond(state_dir: Path) -> AsyncIterator[OpenBond]:
    """Raises as `open_run`, but not for a run that we only bonded in."""
    home = Home.existing(state_dir)
    runs = home.runs()
    if not runs:
        raise Missing(f"{state_dir} knows no run yet")
    folder = home.run_folder(runs[-1])
    contract = recall_bond(folder)
    if contract is None:
        manifest, _ = recall_run(folder)
    else:
        manifest = load_manifest((folder / "manifest.json").read_bytes(), runs[-1])
    async with AsyncExitStack() as stack:
        if (state_dir / URLS).exists():
            chain = await _operators_chain(stack, home)
        else:
            chain = await _members_chain(stack, home)
        yield OpenBond(home, folder, manifest, chain, contract)


async def _operators_chain(stack: AsyncExitStack, home: Home) -> RpcChain:
    chain = RpcChain(HttpRpc(up_urls(home.path)["chain"]))
    try:
        await chain.chain_id()
        return chain
    except TesseraError as error:
        if not (home.path / JOURNAL).exists():
            raise Unavailable(f"the chain does not answer: {error.message}") from error
    try:
        stack.enter_context(home.locked())
    except Conflict as error:
        raise Unavailable("an economy holds the chain but does not answer yet: try again", retry_after_s=5) from error
    ledger = await stack.enter_async_context(open_ledger(home.path / JOURNAL, None, SystemClock()))
    return ledger.chain


async def _members_chain(stack: AsyncExitStack, home: Home) -> RpcChain:
    invitation = last_invitation(home, SystemClock(), even_expired=True)
    start = start_transport(
        engine_of(invitation.host),
        PeerKey.generate(),
        bind=invitation.listen_on,
        relays=invitation.relays,
        clock=SystemClock(),
    )
    transport = await stack.enter_async_context(start)
    return RpcChain(peer_rpc(transport, lambda: invitation.host))


def _known_epochs(folder: Path, manifest: Manifest) -> list[EpochLeaves]:
    if not (folder / "book.sqlite").exists():
        return []
    book = ReceiptBook(folder / "book.sqlite")
    texts = [book.epoch(epoch) for epoch in range(manifest.schedule.epochs)]
    book.close()
    return [EpochLeaves.from_text(text) for text in texts if text is not None]
