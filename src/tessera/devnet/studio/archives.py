"""Zips that agents hand each other: written so that the same work gives the same bytes, read with limits."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

from tessera.core.errors import Invalid

__all__ = ["read_archive", "write_archive"]

MOST_ENTRIES, MOST_BYTES = 64, 64 * 2**20


def write_archive(entries: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


def read_archive(data: bytes) -> dict[str, bytes]:
    """All entries. Raises: Invalid for what is no zip, is compressed, or is too much; names never become paths."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if len(infos) > MOST_ENTRIES or sum(info.file_size for info in infos) > MOST_BYTES:
                raise Invalid(f"an archive has at most {MOST_ENTRIES} entries and {MOST_BYTES} bytes")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise Invalid("an archive's entries are stored, not compressed")
            return {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise Invalid(f"this is no archive: {error}") from error
