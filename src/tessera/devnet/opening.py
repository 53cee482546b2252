"""Opening an economy: chain, coin, text, manifest, host, own workers; closed in reverse order at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from socket import socket

from anyio import to_thread

from tessera.chain.http import rpc_app
from tessera.core.clock import Clock
from tessera.devnet.access import JOURNAL, remember_urls
from tessera.devnet.board import Board
from tessera.devnet.front import Asgi
from tessera.devnet.http import listening
from tessera.devnet.invitations import Door
from tessera.devnet.ledger import Ledger, ensure_coin, ensure_funded, open_ledger
from tessera.devnet.people import load_people
from tessera.devnet.plan import UpConfig, make_manifest
from tessera.devnet.processes import WorkerProcesses
from tessera.devnet.run import Run
from tessera.devnet.text import prepare_text
from tessera.models.config import ModelSpec
from tessera.p2p.blobs import BlobStore, serve_blobs
from tessera.p2p.iroh_transport import IrohTransport
from tessera.training.book import ReceiptBook, SeatBook
from tessera.training.home import Home
from tessera.training.host import RunHost
from tessera.training.invitation import RelayAccess
from tessera.training.rpc_link import serve_rpc

__all__ = ["open_doors", "open_run_here"]

EVERY_ADDRESS = "0.0.0.0"

Tell = Callable[[str], None]


@asynccontextmanager
async def open_doors(
    config: UpConfig, home: Home, sockets: tuple[socket, socket], front: Asgi, clock: Clock
) -> AsyncIterator[tuple[Ledger, dict[str, str]]]:
    """The chain, and the two ports: page with gateway, and the chain's JSON-RPC. Yields the URLs with the chain."""
    async with AsyncExitStack() as stack:
        ledger = await stack.enter_async_context(open_ledger(home.path / JOURNAL, config.chain_url, clock))
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
        blobs = BlobStore(home.blobs)
        text = await to_thread.run_sync(prepare_text, config.data, blobs, home.path / "text.json")
        manifest = make_manifest(
            config,
            text,
            chain_id=ledger.chain_id,
            data_owner=people.data_owner.account,
            creator=people.creator.account,
        )
        folder = home.run_folder(manifest.run_id)
        board, book = Board(manifest, folder / "board.sqlite"), ReceiptBook(folder / "book.sqlite")
        stack.callback(board.close)
        stack.callback(book.close)
        seats = SeatBook(folder / f"host-{ledger.chain_id}.sqlite")
        stack.callback(seats.close)
        relays = tuple(RelayAccess(url, token) for url, token in config.relays)
        start = IrohTransport.start(home.peer_key, bind=_bind(config), clock=clock)
        transport = await stack.enter_async_context(start)
        host = RunHost(
            manifest,
            transport=transport,
            chain=ledger.chain,
            coin=coin,
            operator=people.operator,
            book=seats,
            on_report=board.report,
            pace=lambda: (board.step, board.tokens_per_s),
            clock=clock,
        )
        serve_blobs(transport, blobs)
        serve_rpc(transport, ledger.exchange)
        host.serve()
        own = config.workers(manifest.model.stages)
        door = Door(home, seats, manifest.run_id, ledger.chain_id, transport.record(), clock, relays)
        invitation = door.standing(max(1, manifest.model.stages - own))
        at_home = door.invite(max(1, own), label="own workers")
        workers = WorkerProcesses(at_home.to_text(), home.path / "workers", own)
        await stack.enter_async_context(workers.running())
        yield Run(
            manifest=manifest,
            folder=folder,
            params=await to_thread.run_sync(_count_params, manifest.model),
            ledger=ledger,
            coin=coin,
            people=people,
            text=text,
            blobs=blobs,
            transport=transport,
            host=host,
            board=board,
            book=book,
            invitation=invitation.to_text(),
        )


def _bind(config: UpConfig) -> str:
    """Where peers reach us: the gateway's port, in UDP, so that an invitation outlives a restart."""
    if config.bind:
        return config.bind
    return f"{EVERY_ADDRESS if config.seats else '127.0.0.1'}:{config.port}"


def _count_params(spec: ModelSpec) -> int:
    from tessera.models.stage import Stage

    return sum(p.numel() for stage in range(spec.stages) for p in Stage(spec, stage).parameters())
