"""Opening an economy: chain, coin, text, manifest, host, own workers; closed in reverse order at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from socket import socket

from anyio import to_thread

from tessera.chain.http import rpc_app
from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.devnet.access import JOURNAL, remember_urls
from tessera.devnet.board import Board
from tessera.devnet.front import Asgi
from tessera.devnet.http import listening
from tessera.devnet.invitations import Door
from tessera.devnet.ledger import Ledger, ensure_coin, ensure_funded, ensure_split, open_ledger
from tessera.devnet.people import People, load_people
from tessera.devnet.plan import UpConfig, make_manifest
from tessera.devnet.processes import WorkerProcesses
from tessera.devnet.run import Run
from tessera.devnet.tables import RunTables
from tessera.devnet.text import Text, prepare_text, text_of
from tessera.models.config import ModelSpec
from tessera.p2p.blobs import BlobStore, open_blob_store, serve_blobs
from tessera.p2p.engines import start_transport
from tessera.p2p.pacer import Pacer
from tessera.p2p.relay.url import RelayUrl
from tessera.training.book import ReceiptBook, SeatBook
from tessera.training.home import Home, write_atomic
from tessera.training.host import RunHost
from tessera.training.manifest import Manifest
from tessera.training.rpc_link import serve_rpc

__all__ = ["open_doors", "open_run_here"]

EVERY_ADDRESS = "0.0.0.0"
RELAY_S = 10.0  # how long a start waits for a relay; without one, the record says where it will be

Tell = Callable[[str], None]


@asynccontextmanager
async def open_doors(
    config: UpConfig, home: Home, sockets: tuple[socket, socket], front: Asgi, clock: Clock
) -> AsyncIterator[tuple[Ledger, dict[str, str]]]:
    """The chain, and the two ports: page with gateway, and the chain's JSON-RPC. Yields the URLs with the chain."""
    async with AsyncExitStack() as stack:
        operator = load_people(home).operator
        ledger = await stack.enter_async_context(open_ledger(home.path / JOURNAL, config.chain_url, clock, operator))
        url = await stack.enter_async_context(listening(front, sockets[0]))
        urls = {"page": f"{url}/", "gateway": f"{url}/v1", "chain": ledger.url or ""}
        if ledger.local is not None:
            urls["chain"] = await stack.enter_async_context(listening(rpc_app(ledger.local), sockets[1]))
        remember_urls(home, urls)
        yield ledger, urls


@asynccontextmanager
async def open_run_here(config: UpConfig, home: Home, ledger: Ledger, clock: Clock, tell: Tell) -> AsyncIterator[Run]:
    """The run that `config` describes, hosted here, with this machine's workers started."""
    async with AsyncExitStack() as stack:
        people = load_people(home)
        tell("deploying the test coin")
        await ensure_funded(ledger, people.operator)
        coin = await ensure_coin(ledger, people.operator, home.path / "coins.json")
        tell("reading and tokenising the text")
        blobs = open_blob_store(config.blobs, cache=home.blobs) if config.blobs else BlobStore(home.blobs)
        manifest, text = await to_thread.run_sync(_describe, config, home, ledger.chain_id, people, blobs)
        if config.serving_bps:
            tell("deploying the split of income")
            bps, file = config.serving_bps, home.path / "splits.json"
            split = await ensure_split(ledger, people.operator, coin, bps, manifest.run_id, file)
            manifest = Manifest.model_validate(manifest.model_copy(update={"pay_to": split}).model_dump())
        tables = _open_folder(home, manifest, config.database)
        board, book, seat_book = _open_tables(manifest, tables, stack)
        relays = tuple(RelayUrl(url, token) for url, token in config.relays)
        seats = manifest.model.stages * manifest.replicas
        own = config.workers(seats)
        bind = _bind(config, alone=own == seats)
        start = start_transport(
            config.engine, home.peer_key, bind=bind, relays=relays, clock=clock, pacer=Pacer(), online_s=RELAY_S
        )
        transport = await stack.enter_async_context(start)
        host = RunHost(
            manifest,
            transport=transport,
            chain=ledger.chain,
            coin=coin,
            operator=people.operator,
            book=seat_book,
            on_report=board.report,
            pace=lambda: (board.step, board.tokens_per_s),
            clock=clock,
        )
        serve_blobs(transport, blobs)
        serve_rpc(transport, ledger.exchange)
        tell("deploying the run contract")
        await host.open()
        door = Door(home, seat_book, manifest.run_id, ledger.chain_id, transport.record(), clock, relays)
        invitation = door.standing(max(1, seats - own))
        if own:
            at_home = door.invite(own, label="own workers")
            workers = WorkerProcesses(at_home.to_text(), home.path / "workers", own)
            await stack.enter_async_context(workers.running())
        yield Run(
            manifest=manifest,
            folder=tables.folder,
            tables=tables,
            params=await to_thread.run_sync(_count_params, manifest.model),
            ledger=ledger,
            coin=coin,
            people=people,
            text=text,
            blobs=blobs,
            peer_key=home.peer_key,
            transport=transport,
            host=host,
            board=board,
            book=book,
            invitation=invitation.to_text(),
            open_seats=seats - own,
        )


def _describe(config: UpConfig, home: Home, chain_id: int, people: People, blobs: BlobStore) -> tuple[Manifest, Text]:
    """The manifest that was given, or the one that follows from the options; and its text, prepared."""
    cache = home.path / "text.json"
    if config.manifest is not None:
        try:
            manifest = Manifest.parse(config.manifest.read_bytes())
        except OSError as error:
            raise Invalid(f"cannot read {config.manifest}: {error.strerror}") from error
        if manifest.chain_id != chain_id:
            raise Invalid(
                f"the manifest is for chain {manifest.chain_id}, this one has id {chain_id}: "
                f"draft it with --chain-id {chain_id}, or give the other chain's URL with --chain"
            )
        return manifest, text_of(manifest, blobs, cache)
    text = prepare_text(config.data, blobs, cache)
    owner, creator = people.data_owner.account, people.creator.account
    return make_manifest(config, text, chain_id=chain_id, data_owner=owner, creator=creator), text


def _open_folder(home: Home, manifest: Manifest, database: str) -> RunTables:
    tables = RunTables(home.run_folder(manifest.run_id), manifest.run_id, database)
    write_atomic(tables.folder / "manifest.json", manifest.canonical)
    tables.mark()
    return tables


def _open_tables(manifest: Manifest, tables: RunTables, stack: AsyncExitStack) -> tuple[Board, ReceiptBook, SeatBook]:
    """What the host keeps of the run, closed with `stack`."""
    (where, schema), (book_where, book_schema) = tables.at("board"), tables.at("book")
    board, book = Board(manifest, where, schema=schema), ReceiptBook(book_where, schema=book_schema)
    seats = tables.seats()
    for table in (board, book, seats):
        stack.callback(table.close)
    return board, book, seats


def _bind(config: UpConfig, *, alone: bool) -> str:
    """Where peers reach us: the gateway's port, in UDP, so that an invitation outlives a restart; for zmq, which takes
    TCP, the one after the page's and the chain's."""
    if config.bind:
        return config.bind
    beside = 2 if config.engine == "zmq" and config.port else 0
    return f"{'127.0.0.1' if alone else EVERY_ADDRESS}:{config.port + beside}"


def _count_params(spec: ModelSpec) -> int:
    from tessera.models.stage import Stage

    return sum(p.numel() for stage in range(spec.stages) for p in Stage(spec, stage).parameters())
