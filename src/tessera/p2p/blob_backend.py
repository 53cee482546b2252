"""Blobs in an object storage: any `fsspec` URL (`s3://`, `gcs://`, `file://`, `memory://` …) behind a local folder.

    <url>/<id>/<chunk number, 6 digits>      the bytes of one chunk
    <url>/<id>.index                         the index, written last

One object for each chunk: an upload that is interrupted goes on where it was, a chunk can be checked as soon as it is
here, and nothing needs renaming, appending or ranges, which object storages do not all have. A blob is there when its
index is; two writers of one blob write the same bytes. What a storage returns is checked like what a peer sends.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tessera.core.errors import Invalid, Missing, Unavailable
from tessera.core.hashing import sha256
from tessera.core.ids import BlobId, parse_blob_id
from tessera.p2p.blob_index import CHUNK_BYTES, INDEX_LIMIT
from tessera.p2p.blob_store import BlobStore

__all__ = ["FsspecBackend", "open_blob_store"]

T = TypeVar("T")

DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
IN_STORAGE = DRIVERS.keys()  # object storages: the others have folders
CREDENTIALS = re.compile(r"credential|access ?denied|forbidden|invalidaccesskey|signaturedoesnotmatch|unauthori", re.I)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.*", re.DOTALL)


def open_blob_store(
    url: str | Path,
    *,
    cache: Path | None = None,
    quota_bytes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> BlobStore:
    """The blobs at `url`: a folder, or an object storage with a folder before it.

    Args:
        url: a path, or an fsspec URL such as `s3://bucket/folder`.
        cache: the folder before an object storage; by default one that ends with the machine's temporary files.
        quota_bytes: most bytes in the folder (of a local store, or of the cache).
        options: for the driver: endpoint, profile, key; by default it finds its own (environment, instance role).

    Raises: Invalid for a URL whose scheme no driver has; Unavailable when its driver is not installed, with the
    command that installs it. Whether credentials are right shows at the first use.
    """
    text = str(url)
    if isinstance(url, Path) or _URL.fullmatch(text) is None:
        return BlobStore(Path(url), quota_bytes=quota_bytes)
    backend = FsspecBackend(text, options or {})
    folder = cache or Path(tempfile.gettempdir()) / f"tessera-blobs-{sha256(text.encode()).hex()[:16]}"
    return BlobStore(folder, quota_bytes=quota_bytes, backend=backend)


class FsspecBackend:
    """A `BlobBackend` at an fsspec URL. Batches go in parallel where the driver can do that."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._url = url.split("?")[0]
        self._scheme = url.split("://")[0]
        self._fs, self._root = _open(url, options)

    def index(self, blob: BlobId) -> bytes:
        path = self._path(blob, ".index")
        return self._try("read", lambda: bytes(self._fs.cat_file(path, start=0, end=INDEX_LIMIT + 1)))

    def chunks(self, blob: BlobId, numbers: Sequence[int]) -> list[bytes]:
        paths = [self._chunk(blob, number) for number in numbers]
        starts, ends = [0] * len(paths), [CHUNK_BYTES + 1] * len(paths)
        return self._try("read", lambda: _all_of(self._fs.cat_ranges(paths, starts, ends, on_error="raise")))

    def sizes(self, blob: BlobId) -> dict[int, int]:
        try:
            entries = self._try("list", lambda: self._fs.ls(self._path(blob), detail=True))
        except Missing:
            return {}
        found = [(str(entry["name"]).rsplit("/", 1)[-1], entry.get("size")) for entry in entries]
        return {int(name): size for name, size in found if name.isdecimal() and isinstance(size, int)}

    def put_chunks(self, blob: BlobId, chunks: Mapping[int, bytes]) -> None:
        objects = {self._chunk(blob, number): data for number, data in chunks.items()}

        def put() -> None:
            self._make_folder(self._path(blob))
            self._fs.pipe(objects)

        self._try("write", put)

    def put_index(self, blob: BlobId, data: bytes) -> None:
        path = self._path(blob, ".index")

        def put() -> None:
            self._make_folder(self._root)
            if self._scheme in IN_STORAGE:  # such a storage shows an object when it is whole
                self._fs.pipe_file(path, data)
            else:
                self._fs.pipe_file(f"{path}.new", data)
                self._fs.mv(f"{path}.new", path)

        self._try("write", put)

    def remove(self, blob: BlobId) -> None:
        """The index first: what is left of an interrupted removal is no blob."""
        for path in (self._path(blob, ".index"), self._path(blob)):
            try:
                self._try("remove", partial(self._fs.rm, path, recursive=True))
            except Missing:
                continue

    def _path(self, blob: BlobId, suffix: str = "") -> str:
        return f"{self._root}/{parse_blob_id(blob)}{suffix}"

    def _chunk(self, blob: BlobId, number: int) -> str:
        return f"{self._path(blob)}/{number:06}"

    def _make_folder(self, path: str) -> None:
        if self._scheme not in IN_STORAGE:  # where folders do not exist; some drivers would create the bucket
            self._fs.makedirs(path, exist_ok=True)

    def _try(self, what: str, action: Callable[[], T]) -> T:
        """Drivers raise what their libraries raise; here it becomes what the caller can act on."""
        try:
            return action()
        except FileNotFoundError as error:
            if what == "write":
                fix = "create the bucket or folder first"
                raise Unavailable(f"cannot write to {self._url}: {error}; {fix}", retry_after_s=60.0) from error
            raise Missing(f"{self._url} has no such blob") from error
        except Exception as error:
            raise self._unavailable(what, error) from error

    def _unavailable(self, what: str, error: Exception) -> Unavailable:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        if isinstance(error, PermissionError) or CREDENTIALS.search(reason):
            fix = "give credentials that may (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role)"
            return Unavailable(f"{self._url} does not let us {what}: {reason}; {fix}", retry_after_s=60.0)
        fix = "check the address and the network, then try again"
        return Unavailable(f"cannot {what} at {self._url}: {reason}; {fix}", retry_after_s=5.0)


def _open(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    import fsspec  # and slow: only who has a URL waits for it

    scheme = url.split("://")[0]
    try:
        # no listings from memory: other machines write there too
        fs, root = fsspec.core.url_to_fs(url, **{"use_listings_cache": False, **options})
    except ImportError as error:
        driver = DRIVERS.get(scheme)
        fix = f"pip install {driver}" if driver else str(error)
        raise Unavailable(f"{scheme}:// needs a driver that is not installed: {fix}", retry_after_s=3600.0) from error
    except ValueError as error:
        known = ", ".join(sorted(DRIVERS))
        raise Invalid(f"cannot open {url[:200]!r}: {error}; give a folder, file://, or one of {known}") from error
    return fs, str(root).rstrip("/")


def _all_of(found: Sequence[bytes | Exception]) -> list[bytes]:
    """Some drivers return a failure in the place of the bytes."""
    for data in found:
        if isinstance(data, Exception):
            raise data
    return [bytes(data) for data in found if not isinstance(data, Exception)]
