"""Blobs between peers: whoever has one may serve it, and nothing that arrives is believed unchecked.

A fetch asks all its peers at once, goes on from what is on disk after an interruption, and compares each chunk with its
hash, so that the bytes may come from anybody; a peer that serves others is dropped and named. How, stands in
`blob_fetch`; what goes over the wire, in `blob_wire`; where blobs lie, in `blob_store` and `blob_backend`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import anyio
import structlog
from anyio import to_thread

from tessera.core.errors import Late, Misbehaviour, Missing, Unavailable
from tessera.core.ids import BlobId, parse_blob_id
from tessera.p2p.blob_backend import open_blob_store
from tessera.p2p.blob_fetch import Fetch, Fetched, Progress
from tessera.p2p.blob_store import BlobStore
from tessera.p2p.blob_wire import BLOBS, serve_blobs
from tessera.p2p.transport import PeerRecord, Transport

__all__ = ["BLOBS", "BlobStore", "Fetched", "Progress", "fetch", "open_blob_store", "serve_blobs"]

log = structlog.get_logger()


async def fetch(
    transport: Transport,
    peers: Sequence[PeerRecord],
    blob: BlobId,
    store: BlobStore,
    *,
    timeout_s: float,
    progress: Progress | None = None,
) -> Fetched:
    """Have `blob` in `store`'s folder, from the storage behind it or else from any of `peers`.

    What came before a failure, a cancellation or a kill is kept for the next try, but for a few pieces.

    Args:
        progress: told, as bytes arrive, how many of the blob's are here and how many it has. Those are not all
            checked yet; the first number falls when some turn out wrong.

    Raises: Late; Missing when no peer has it; Misbehaviour, with the peers' names, when none is left because some
    served wrong bytes; Unavailable when none is left for other reasons, or for want of room (`need_bytes`,
    `have_bytes`; before a byte is fetched) or a disk that refuses; Conflict when another process fetches it just now.
    """
    blob = parse_blob_id(blob)
    try:
        with anyio.fail_after(timeout_s):
            while (other := store.fetching.get(blob)) is not None:
                await other.wait()
            over = store.fetching[blob] = anyio.Event()
            try:
                return await _have(transport, peers, blob, store, progress)
            finally:
                del store.fetching[blob]
                over.set()
    except TimeoutError:
        raise Late(f"blob {blob[:16]}… was not complete within {timeout_s:g} s: fetch again to go on") from None


async def _have(
    transport: Transport, peers: Sequence[PeerRecord], blob: BlobId, store: BlobStore, progress: Progress | None
) -> Fetched:
    stopped = threading.Event()
    try:
        kept = await to_thread.run_sync(_kept, store, blob, stopped, abandon_on_cancel=True)
    except (Missing, Unavailable, Misbehaviour) as error:
        if not peers and not isinstance(error, Missing):
            raise
        if not isinstance(error, Missing):
            log.warning("blob_storage_failed", blob=blob, code=error.code, reason=error.message)
        return await Fetch(transport, peers, blob, store, progress).run()
    finally:
        stopped.set()  # a thread that is left to itself ends after the batch that it waits for
    return Fetched(store.path(blob), 0, kept, 0, ())


def _kept(store: BlobStore, blob: BlobId, stopped: threading.Event) -> int:
    """The size of a blob that needs no peer."""
    if not store.is_here(blob):
        store.pull(blob, stop=stopped.is_set)
    return store.index(blob).size
