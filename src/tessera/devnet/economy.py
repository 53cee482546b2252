"""The whole economy on one machine, from the first block to a table that adds up; what `tessera up` runs.

Phases: starting (chain, coin, text) → seating → training → serving → closed. Everything that must last lies in the
state directory, so an economy that was stopped anywhere goes on from there.
"""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import structlog
from anyio import to_thread

from tessera.chain.faces import Coin
from tessera.chain.http import rpc_app
from tessera.core.clock import Clock
from tessera.core.errors import TesseraError
from tessera.core.ids import Account
from tessera.devnet.access import remember_urls
from tessera.devnet.board import Board
from tessera.devnet.books import Books
from tessera.devnet.front import Asgi, Front
from tessera.devnet.http import bind_ports, listening
from tessera.devnet.ledger import Ledger, ensure_coin, ensure_funded, give_coins, open_ledger
from tessera.devnet.node import LiveRoster
from tessera.devnet.people import People, load_people
from tessera.devnet.plan import UpConfig, make_manifest
from tessera.devnet.processes import WorkerProcesses
from tessera.devnet.text import Text, load_dataset, load_tokenizer, prepare_text
from tessera.models.presets import DEFAULT_BATCH, default_spec
from tessera.p2p.blobs import BlobStore, serve_blobs
from tessera.p2p.iroh_transport import IrohTransport
from tessera.serving.buyer import Buyer
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.payments import PaymentConfig, Settlement, X402Payments
from tessera.serving.shard_engine import ShardEngine, ShardEngineConfig
from tessera.training.home import Home, write_atomic
from tessera.training.host import RunHost
from tessera.training.manifest import Manifest
from tessera.training.receipts import ReceiptBook
from tessera.training.roster import Roster, remember_run
from tessera.training.rpc_link import serve_rpc
from tessera.training.ticket import Ticket

__all__ = ["Economy"]

log = structlog.get_logger()

BUYER_UNITS = 100_000_000  # test coins for the first buyer: 100 tUSD
TICKET_S = 7 * 24 * 3600
POLL_S = 0.25
SETTLE_S = 120.0  # how long a closing economy waits for everybody's claims
SAMPLE_TOKENS = 96
EVERY_ADDRESS = "0.0.0.0"


@dataclass
class Economy:
    """State of a running economy; `run` drives it.

    Args:
        page: builds the page's ASGI app for this economy.
        changed: told after every change that people would want to see.
    """

    config: UpConfig
    clock: Clock
    page: Callable[[Economy], Asgi]
    changed: Callable[[Economy], None]
    started: float = field(default_factory=time.monotonic)
    phase: str = "starting"
    note: str = ""
    urls: dict[str, str] = field(default_factory=dict)
    ticket: str = ""
    samples: list[tuple[str, str]] = field(default_factory=list)  # prompt, answer
    payments: list[Settlement] = field(default_factory=list)
    ledger: Ledger = field(init=False)
    coin: Account = field(init=False)
    people: People = field(init=False)
    text: Text = field(init=False)
    manifest: Manifest | None = None
    board: Board = field(init=False)
    host: RunHost = field(init=False)
    roster: Roster | None = None
    books: Books = field(init=False)
    processes: WorkerProcesses | None = None
    opened: bool = False  # host and board stand
    params: int = 0  # numbers in the whole model

    async def run(self) -> None:
        """Everything, in order. With `once` it returns when the table adds up; else it goes on until cancelled."""
        home = Home(self.config.state_dir)
        with home.locked():
            async with self._opened(home) as (transport, front, folder):
                await self._seat(folder)
                await self._train()
                await self._open_gateway(transport, front, home)
                await self._sell()
                await self._settle_all()
                if not self.config.once:
                    await self._stay_open()
                self._enter("closed")
                await self.host.close()

    # --- starting ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _opened(self, home: Home) -> AsyncIterator[tuple[IrohTransport, Front, Path]]:
        """Chain, sockets, peer link, host and own workers, closed in reverse order at the end."""
        config = self.config
        async with AsyncExitStack() as stack:
            front = Front(self.page(self))
            sockets = stack.enter_context(bind_ports(config.host, config.port))
            self.ledger = await stack.enter_async_context(
                open_ledger(home.path / "chain.sqlite", config.chain_url, self.clock)
            )
            await self._serve_http(stack, front, sockets)
            remember_urls(home, self.urls)
            self.people = load_people(home)
            self._enter("starting", "deploying the test coin")
            await ensure_funded(self.ledger, self.people.operator)
            self.coin = await ensure_coin(self.ledger, self.people.operator, home.path / "coins.json")
            blobs = BlobStore(home.blobs)
            manifest = self.manifest = await self._describe_run(home, blobs)
            folder = home.run_folder(manifest.run_id)
            write_atomic(folder / "manifest.json", manifest.canonical)
            self.board = Board(manifest, folder / "board.sqlite")
            stack.callback(self.board.close)
            self._book = ReceiptBook(folder / "book.sqlite")
            stack.callback(self._book.close)
            transport = await stack.enter_async_context(IrohTransport.start(home.peer_key, bind=self._bind()))
            self._transport = transport
            serve_blobs(transport, blobs)
            serve_rpc(transport, self.ledger.exchange)
            self._open_host(manifest, transport, folder)
            self.opened = True
            self._print_ticket(manifest, transport, home)
            own = WorkerProcesses(self.ticket, home.path / "workers", config.stages - config.seats)
            self.processes = own
            await stack.enter_async_context(own.running())
            yield transport, front, folder

    async def _serve_http(
        self, stack: AsyncExitStack, front: Front, sockets: tuple[socket.socket, socket.socket]
    ) -> None:
        url = await stack.enter_async_context(listening(front, sockets[0]))
        self.urls = {"page": f"{url}/", "gateway": f"{url}/v1"}
        if self.ledger.local is not None:
            self.urls["chain"] = await stack.enter_async_context(listening(rpc_app(self.ledger.local), sockets[1]))
        else:
            sockets[1].close()
            self.urls["chain"] = self.ledger.url or ""

    async def _describe_run(self, home: Home, blobs: BlobStore) -> Manifest:
        self._enter("starting", "reading and tokenising the text")
        vocab_size = default_spec(self.config.stages).model.vocab_size
        self.text = await to_thread.run_sync(
            lambda: prepare_text(
                self.config.data,
                vocab_size=vocab_size,
                length=DEFAULT_BATCH.length,
                blobs=blobs,
                cache=home.path / "text.json",
            )
        )
        return make_manifest(
            self.config,
            self.text,
            chain_id=self.ledger.chain_id,
            data_owner=self.people.data_owner.account,
            creator=self.people.creator.account,
        )

    def _open_host(self, manifest: Manifest, transport: IrohTransport, folder: Path) -> None:
        self.host = RunHost(
            manifest,
            transport=transport,
            chain=self.ledger.chain,
            coin=self.coin,
            operator=self.people.operator,
            file=folder / f"host-{self.ledger.chain_id}.sqlite",
            on_report=self._on_report,
        )
        self.host.serve()

    def _print_ticket(self, manifest: Manifest, transport: IrohTransport, home: Home) -> None:
        expires = int(self.clock.time()) + TICKET_S
        ticket = Ticket(manifest.run_id, manifest.chain_id, (transport.record(),), expires)
        self.ticket = ticket.to_text()
        write_atomic(home.path / "ticket", self.ticket.encode())

    def _bind(self) -> str:
        """Where peers reach us: the port of the gateway, in UDP, so that a ticket outlives a restart."""
        if self.config.bind:
            return self.config.bind
        return f"{EVERY_ADDRESS if self.config.seats else '127.0.0.1'}:{self.config.port}"

    # --- seating and training ---------------------------------------------------------------------------------------

    async def _seat(self, folder: Path) -> None:
        open_seats = f"{self.config.seats} open, ticket printed below" if self.config.seats else "own workers"
        self._enter("seating", f"{self.config.stages} stages, {open_seats}")
        self.roster = await self.host.seat_everyone()
        assert self.manifest is not None
        remember_run(folder, self.manifest, self.roster)
        self.board.note(f"the share contract stands at {self.roster.share}")
        accounts = [*self.roster.accounts, *(owner.account for owner in self.manifest.owners)]
        self.books = Books(self.ledger.chain, self.roster, self._transport, self._book, accounts)

    async def _train(self) -> None:
        """Wait until every stage is trained and every epoch is on the chain."""
        self._enter("training")
        while not (self.board.everyone("trained") and self.board.everyone("settled")):
            await self._refresh_books()
            self.changed(self)
            await anyio.sleep(POLL_S)

    def _on_report(self, stage: int, report: Any) -> None:
        self.board.report(stage, report)

    # --- serving ----------------------------------------------------------------------------------------------------

    async def _open_gateway(self, transport: IrohTransport, front: Front, home: Home) -> None:
        assert self.manifest is not None and self.roster is not None  # set before we got here
        manifest, roster = self.manifest, self.roster
        self._enter("serving", "opening the gateway")
        self.host.phase = "serving"
        blobs = BlobStore(home.blobs)
        tokenizer = await to_thread.run_sync(load_tokenizer, blobs, manifest.tokenizer)
        model = manifest.model.model
        engine = ShardEngine(
            transport,
            LiveRoster(self.host.roster),
            ShardEngineConfig(context=model.context, vocab_size=model.vocab_size),
        )
        coin = Coin(self.ledger.chain, self.coin)
        config = PaymentConfig(
            asset=self.coin,
            asset_name=await coin.name(),
            asset_version=await coin.version(),
            price_units=manifest.price_units,
            pay_to=roster.share if manifest.pay_to == "share" else Account(manifest.pay_to),
        )
        payments = await X402Payments.open(
            config, self.ledger.chain, self.people.operator, clock=self.clock, on_settled=self._on_settled
        )
        front.gateway = create_app(GatewayConfig(model=manifest.name), engine, tokenizer, payments)

    def _on_settled(self, payment: Settlement) -> None:
        self.payments.append(payment)
        self.board.note(f"{payment.payer} paid {payment.units} units for an answer")

    async def _sell(self) -> None:
        """The first buyer pays for a few answers, through the same door as any other."""
        assert self.manifest is not None and self.roster is not None
        account = self.people.buyer.account
        await give_coins(self.ledger, self.coin, self.people.operator, account, BUYER_UNITS)
        buyer = Buyer(
            self.urls["page"],
            self.people.buyer,
            chain_id=self.ledger.chain_id,
            asset=self.coin,
            max_units_each=self.manifest.price_units,
            max_units=self.manifest.price_units * self.config.requests,
        )
        async with buyer:
            for number, prompt in enumerate(await self._prompts()):
                answer = await buyer.complete(
                    prompt, model=self.manifest.name, max_tokens=SAMPLE_TOKENS, temperature=0.5, seed=number
                )
                self.samples.append((prompt, str(answer["choices"][0]["text"])))
                await self._refresh_books()

    async def _prompts(self) -> list[str]:
        """What the first buyer asks: beginnings of Python, or of the run's own validation text."""
        count = self.config.requests
        if self.config.data is None:
            starts = ["import os\n\ndef ", "class Error(Exception):\n    ", "    def __init__(self", "    if not ", "for "]
            return [starts[i % len(starts)] for i in range(count)]
        assert self.manifest is not None
        blobs = BlobStore(self.config.state_dir / "blobs")
        dataset = await to_thread.run_sync(load_dataset, blobs, self.manifest.dataset)
        tokenizer = await to_thread.run_sync(load_tokenizer, blobs, self.manifest.tokenizer)
        room = max(1, len(dataset.validation) - 16)
        starts_at = [room * i // count for i in range(count)]
        return [tokenizer.decode([int(t) for t in dataset.validation[s : s + 16]]) or " " for s in starts_at]

    # --- money ------------------------------------------------------------------------------------------------------

    async def _settle_all(self) -> None:
        """Spread what came in, and wait until everybody has his part; the workers claim their own."""
        self.note = "spreading the income"
        deadline = time.monotonic() + SETTLE_S
        while True:
            await self._move_money()
            income = self.books.income
            if income.unclaimed == 0 and income.undistributed == 0:
                self.note = "every part is claimed"
                return
            if time.monotonic() > deadline:
                self.note = "some income is not claimed yet; it waits in the contract"
                log.warning("income_unclaimed", units=str(income.unclaimed), seconds=SETTLE_S)
                return
            await anyio.sleep(POLL_S)

    async def _move_money(self) -> None:
        """Anyone may do this; the economy does it for the owners, who run no process."""
        await self._refresh_books()
        await self.books.distribute(self.people.operator)
        for owner in (self.people.data_owner, self.people.creator):
            await self.books.pay_out(owner.account, self.people.operator)
        await self._refresh_books()

    async def _refresh_books(self) -> None:
        if await self.books.refresh():
            self.changed(self)

    async def _stay_open(self) -> None:
        """Serve until cancelled; income that arrives is spread as it comes."""
        self._enter("serving", "open: Ctrl-C ends it, `tessera up` goes on from there")
        while True:
            try:
                await self._refresh_books()
                if self.books.income.undistributed or self.books.income.unclaimed:
                    await self._move_money()
            except TesseraError as error:
                log.warning("books_not_refreshed", code=error.code, reason=error.message)
            await anyio.sleep(4 * POLL_S)

    def _enter(self, phase: str, note: str = "") -> None:
        if phase != self.phase:
            log.info("phase", phase=phase, note=note)
        self.phase, self.note = phase, note
        self.changed(self)
