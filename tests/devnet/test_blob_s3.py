"""Blobs on S3, against a server that speaks it. Needs s3fs, and moto with flask; skipped without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blob_world import DATA, MISSING
from tessera.core.errors import Missing, Unavailable
from tessera.p2p.blob_backend import open_blob_store
from tessera.p2p.blob_index import CHUNK_BYTES
from tessera.p2p.blob_store import BlobStore

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # theirs


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs")
    pytest.importorskip("flask_cors")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def store(endpoint: str, cache: Path, url: str = "s3://team/blobs") -> BlobStore:
    return open_blob_store(url, cache=cache, options={"endpoint_url": endpoint})


def test_what_one_machine_puts_on_s3_another_reads(endpoint: str, tmp_path: Path) -> None:
    import s3fs

    s3 = s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)
    s3.mkdir("team")
    one, other = store(endpoint, tmp_path / "one"), store(endpoint, tmp_path / "other")
    blob = one.put(DATA)
    assert other.has(blob)
    assert not other.has(MISSING)
    assert other.read_chunk(blob, 1) == DATA[CHUNK_BYTES : 2 * CHUNK_BYTES]
    s3.rm(f"team/blobs/{blob}.index")
    s3.rm(f"team/blobs/{blob}/000003")
    assert not store(endpoint, tmp_path / "third").has(blob)
    assert one.put(DATA) == blob, "goes on where an upload broke off"
    assert other.path(blob).read_bytes() == DATA
    one.remove(blob)
    assert s3.find("team") == []
    with pytest.raises(Missing):
        store(endpoint, tmp_path / "fourth").path(blob)


def test_a_bucket_that_does_not_exist_is_said_and_not_made(endpoint: str, tmp_path: Path) -> None:
    import s3fs

    with pytest.raises(Unavailable, match="create the bucket"):
        store(endpoint, tmp_path / "one", "s3://nowhere/blobs").put(DATA)
    assert "nowhere" not in s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False).ls("")


def test_a_storage_that_does_not_answer_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Unavailable, match="check the address and the network"):
        store("http://127.0.0.1:9", tmp_path / "one").has(MISSING)


def test_missing_credentials_are_said(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Unavailable, match="AWS_ACCESS_KEY_ID"):
        store(endpoint, tmp_path / "one").put(DATA)
