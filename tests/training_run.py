"""A run's whole surroundings in one process and in virtual time: chain, host, keepers, pipelines."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio

from tessera.chain.authorization import authorize
from tessera.chain.client import RpcChain
from tessera.chain.consent import Consent
from tessera.chain.faces import Coin, ModelShare, Run
from tessera.chain.local import LocalChain
from tessera.chain.rpc import BytesRpc
from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Unavailable
from tessera.core.ids import Account, PeerId
from tessera.core.signing import AccountKey, PeerKey
from tessera.p2p.calls import call
from tessera.p2p.memory import MemoryNetwork, MemoryTransport, VirtualClock
from tessera.p2p.transport import PeerRecord
from tessera.training.bond import peer_bytes
from tessera.training.book import ReceiptBook, SeatBook
from tessera.training.gate import Gate, GateConfig
from tessera.training.home import Home
from tessera.training.host import RunHost, WorkerReport
from tessera.training.invitation import Invitation
from tessera.training.joining import HostLink
from tessera.training.keeper import Keeper
from tessera.training.manifest import Manifest
from tessera.training.protocols import EPOCH, JOIN
from tessera.training.receipts import Receipt
from tessera.training.roster import Roster, Seat, seat_binding
from tessera.training.seating import Seated, WorkerConfig
from tessera.training.sensors import FakeSensors, Sensors
from tessera.training.terms import terms_of
from tessera.training.worker import Worker
from training_world import account_keys, all_receipts, peer_keys

OPERATOR = AccountKey(b"\x31" * 32)
HOST_KEY = PeerKey(b"\x32" * 32)
STRANGER = PeerKey(b"\x33" * 32)
INVITATION_ID = "ab" * 16


def make_seat(manifest: Manifest, stage: int, record: PeerRecord, account: AccountKey) -> Seat:
    """Bound by its account, as a joiner's is."""
    return Seat(stage, record, account.account, seat_binding(manifest.run_id, record.id, stage, account))


@dataclass
class Ledger:
    """An embedded chain that answers at once, without threads, unless it is `away`."""

    manifest: Manifest
    away: bool = False
    local: LocalChain = field(init=False)
    chain: RpcChain = field(init=False)

    def __post_init__(self) -> None:
        self.local = LocalChain(None, chain_id=self.manifest.chain_id, clock=VirtualClock())
        self.chain = RpcChain(BytesRpc(self.exchange))

    async def exchange(self, body: bytes) -> bytes:
        await anyio.lowlevel.checkpoint()
        if self.away:
            raise Unavailable("the node is away")
        return self.local.handle(body)

    async def coin(self) -> Account:
        return await self.chain.deploy(OPERATOR, "coin")

    async def deploy_run(self, coin: Account) -> Run:
        run_id = bytes.fromhex(self.manifest.run_id)
        return await Run.deploy(self.chain, OPERATOR, coin, run_id, terms_of(self.manifest))

    async def bond(self, run: Run, account: AccountKey, peer: PeerId) -> int:
        """As a joiner with his host; the stage that is drawn."""
        stake, coin = self.manifest.settlement.stake_units, Coin(self.chain, await run.asset())
        await coin.mint(OPERATOR, account.account, stake)
        nonce = Consent(self.manifest.chain_id, run.address, self.manifest.run_id).bond_nonce(
            account.account, peer_bytes(peer)
        )
        paid = await authorize(coin, account, run.address, stake, valid_before=2**40, nonce=nonce)
        await run.bond(OPERATOR, account.account, peer_bytes(peer), 0, paid.valid_before, *paid.vrs)
        await run.draw(OPERATOR, account.account)
        return (await run.members(account.account)).stage

    async def begin(self, members: Sequence[tuple[AccountKey, PeerId]]) -> tuple[Run, ModelShare]:
        """A run that these have begun, at whatever stages were drawn for them."""
        coin, run_id = await self.coin(), bytes.fromhex(self.manifest.run_id)
        run = await self.deploy_run(coin)
        for account, peer in members:
            await self.bond(run, account, peer)
        share = await ModelShare.deploy(self.chain, OPERATOR, "small", "TSRA", coin, run_id, run.address)
        await run.begin(OPERATOR, share.address, [account.account for account, _ in members])
        return run, share


# --- keepers ----------------------------------------------------------------------------------------------------------


@dataclass
class Settler:
    """One worker as its keeper sees it: what it holds, and how far it is."""

    key: PeerKey
    account_key: AccountKey
    transport: MemoryTransport
    book: ReceiptBook
    keeper: Keeper
    steps_done: int

    async def settle(self) -> None:
        self.keeper.serve()
        await self.keeper.run()


@dataclass
class Settlement:
    """Workers with a share contract, whose training is done."""

    manifest: Manifest
    ledger: Ledger
    network: MemoryNetwork
    roster: Roster
    settlers: list[Settler]
    run: Run
    share: ModelShare

    async def ask(
        self, sender: int, receiver: int, request: dict[str, Any], body: bytes = b""
    ) -> tuple[dict[str, Any], bytes]:
        """A call among keepers."""
        record = self.settlers[receiver].transport.record()
        transport = self.settlers[sender].transport
        return await call(transport, record, EPOCH, request, body, timeout_s=10, reply_limit=1 << 20)


@asynccontextmanager
async def settlement(
    manifest: Manifest,
    folder: Path,
    *,
    companions: int = 0,
    held: Callable[[int, Receipt], bool] = lambda stage, receipt: True,
    chain_of: Callable[[int, RpcChain], RpcChain] = lambda stage, chain: chain,
) -> AsyncIterator[Settlement]:
    """Everybody holds the receipts for his own work and those that he signed, as far as `held` says so.

    Args:
        companions: more workers of stage 0, the last settlers, who did nothing themselves.
    """
    stages = manifest.model.stages
    count = stages + companions
    keys, accounts = peer_keys(count), account_keys(count)
    ledger = Ledger(manifest)
    run, share = await ledger.begin([(accounts[i], keys[i].id) for i in range(count)])
    network = MemoryNetwork(random.Random(0), delay_s=0.01, clock=VirtualClock())
    receipts = all_receipts(manifest, keys[:stages], range(manifest.schedule.steps))
    async with AsyncExitStack() as stack:
        transports = [await stack.enter_async_context(network.start(key)) for key in keys]
        seats = [make_seat(manifest, i if i < stages else 0, transports[i].record(), accounts[i]) for i in range(count)]
        seats.sort(key=lambda seat: seat.stage)
        roster = Roster(manifest.run_id, stages, tuple(seats), run.address, share.address, await run.asset())
        settlers = []
        for i in range(count):
            book = ReceiptBook(folder / f"keeper-{i}.sqlite")
            stack.callback(book.close)
            book.add(r for r in receipts if keys[i].id in (r.worker, r.signer) and held(i, r))
            settler = Settler(
                keys[i],
                accounts[i],
                transports[i],
                book,
                Keeper(
                    manifest,
                    transport=transports[i],
                    chain=chain_of(i, ledger.chain),
                    account_key=accounts[i],
                    book=book,
                    roster=lambda: roster,
                    steps_done=lambda i=i: settlers[i].steps_done,
                    clock=network.clock,
                ),
                manifest.schedule.steps,
            )
            settlers.append(settler)
        yield Settlement(manifest, ledger, network, roster, settlers, run, share)


async def settle_all(settlers: Iterable[Settler]) -> None:
    async with anyio.create_task_group() as tasks:
        for settler in settlers:
            tasks.start_soon(settler.settle)


# --- a host -----------------------------------------------------------------------------------------------------------


@dataclass
class Hosted:
    """An open host and four peers that have not joined yet."""

    manifest: Manifest
    ledger: Ledger
    coin: Account
    host: RunHost
    book: SeatBook
    host_transport: MemoryTransport
    peers: list[MemoryTransport]
    keys: list[PeerKey]
    accounts: list[AccountKey]
    reports: list[tuple[Seat, WorkerReport]]
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)

    def request(self, peer: int, at: int = 0, **changes: Any) -> dict[str, Any]:
        """An honest request for a seat at stage `at`, and then `changes` of the seat or of the rest."""
        seat = make_seat(self.manifest, at, self.peers[peer].record(), self.accounts[peer]).to_value()
        mine = {"op": "take", "invitation": INVITATION_ID, "pace": None, "run_id": self.manifest.run_id}
        request: dict[str, Any] = {**mine, "seat": seat}
        for name, value in changes.items():
            (seat if name in seat else request)[name] = value
        return request

    async def look(self, peer: int) -> list[int]:
        """The stages of which the host says that one may be drawn."""
        reply, _ = await self.ask(peer, JOIN, self.request(peer, op="look"))
        return [int(stage) for stage in reply["stages"]]

    async def bond(self, peer: int, account: Account | None = None, **changes: Any) -> Any:
        """The stage that is drawn; None while a stake is still to come."""
        mine = {"op": "bond", "account": account or self.accounts[peer].account, "authorization": None}
        reply, _ = await self.ask(peer, JOIN, {**self.request(peer), **mine, **changes})
        return reply["stage"]

    async def join(self, peer: int, **changes: Any) -> int:
        """The stage that is drawn and taken."""
        stage = await self.bond(peer) if "invitation" not in changes and "run_id" not in changes else 0
        request = self.request(peer, stage, **changes)
        reply, body = await self.ask(peer, JOIN, request)
        assert body == self.manifest.canonical
        self.replies[peer] = reply
        return int(request["seat"]["stage"])

    async def ask(self, peer: int, protocol: str, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        record = self.host_transport.record()
        return await call(self.peers[peer], record, protocol, request, timeout_s=10, reply_limit=1 << 20)


@asynccontextmanager
async def hosted(
    manifest: Manifest, folder: Path, ledger: Ledger | None = None, coin: Account | None = None
) -> AsyncIterator[Hosted]:
    """`folder` keeps the host's state: a second time, it is the same host after a restart."""
    count = manifest.model.stages * manifest.replicas + 1
    keys, accounts = peer_keys(count), account_keys(count)
    ledger = ledger or Ledger(manifest)
    network = MemoryNetwork(random.Random(0), clock=VirtualClock())
    reports: list[tuple[Seat, WorkerReport]] = []
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(network.start(HOST_KEY))
        peers = [await stack.enter_async_context(network.start(key)) for key in keys]
        book = seat_book(folder)
        stack.callback(book.close)
        coin = coin or await ledger.coin()
        host = RunHost(
            manifest,
            transport=transport,
            chain=ledger.chain,
            coin=coin,
            operator=OPERATOR,
            book=book,
            on_report=lambda seat, report: reports.append((seat, report)),
            pace=lambda: (0, 0.0),
            clock=network.clock,
        )
        await host.open()
        yield Hosted(manifest, ledger, coin, host, book, transport, peers, keys, accounts, reports)


def seat_book(folder: Path) -> SeatBook:
    """The host's, with an invitation for everybody in it."""
    book = SeatBook(folder / "host.sqlite")
    if book.invitation(INVITATION_ID) is None:
        book.save_invitation(INVITATION_ID, 100, 10**10)
    return book


# --- a worker ---------------------------------------------------------------------------------------------------------


def invitation_to(manifest: Manifest, host: PeerRecord, **changes: Any) -> Invitation:
    """To `seat_book`'s host, signed by it, and then `changes`."""
    fields: dict[str, Any] = {
        "run_id": manifest.run_id, "chain_id": manifest.chain_id, "peers": (host,), "relays": (),
        "id": INVITATION_ID, "seats": 100, "expires": 9_999_999_999, **changes,
    }  # fmt: skip
    draft = Invitation(**fields)
    return replace(draft, signature=HOST_KEY.sign("invitation", encoding.encode(draft._body())))


def make_worker(
    home: Home,
    invitation: Invitation,
    transport: MemoryTransport,
    clock: Clock,
    serve: Callable[[Seated], Awaitable[None]],
    *,
    patience_s: float = 60.0,
    sensors: Sensors | None = None,
) -> Worker:
    """A worker whose machine has nothing else to do."""
    gate = Gate(GateConfig(poll_s=60.0), sensors or FakeSensors(), clock)
    host = HostLink(transport, invitation, patience_s=patience_s, clock=clock)
    return Worker(home, host, WorkerConfig(), pace=None, gate=gate, clock=clock, serve=serve)
