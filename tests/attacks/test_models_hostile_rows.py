"""Files that an owner got from somebody else: bombs, damage, rows that are no text. Refused or skipped."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_world import write
from tessera.core.errors import Invalid
from tessera.models import corpus_parquet, corpus_parquet_child, corpus_rows
from tessera.models.corpus import Skipped, open_source
from tessera.models.corpus_pages import Pages, scan_pages

GOOD = [f"row {n} of many" for n in range(200)]


def read(path: Path, field: str = "text") -> tuple[list[str], Skipped]:
    source, skipped = open_source(path, field=field), Skipped()
    texts = [p.text for n in range(len(source.files)) for p in source.read(n, 0, skipped)]
    return texts, skipped


def lines(path: Path, *bad: bytes) -> Path:
    rows = [json.dumps({"text": text}).encode() for text in GOOD]
    write(path, {"rows.jsonl": b"\n".join([*rows[:100], *bad, *rows[100:]])})
    return path / "rows.jsonl"


def parquet(path: Path, column: Any, name: str = "text", **options: Any) -> Path:
    file = path / "rows.parquet"
    pq.write_table(pa.table({name: column}), file, **options)
    return file


# --- JSON lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{", "no JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "no object but a list"),
        (b"null", "no object but a NoneType"),
        (b"{}", "its 'text' is missing"),
        (b'{"text": null}', "its 'text' is missing"),
        (b'{"text": 7}', "its 'text' is no text"),
        (b'{"text": ["a"]}', "its 'text' is no text"),
        (b'{"text": "a\\u0000b"}', "zero byte"),
        (b'{"text": "a\\ud800b"}', "lone surrogate"),
    ],
)
def test_a_bad_line_is_skipped_counted_and_named(row: bytes, reason: str, tmp_path: Path) -> None:
    texts, skipped = read(lines(tmp_path, row))
    assert texts == GOOD
    assert skipped.rows == 1
    assert f"rows.jsonl, byte {len(b'x'.join([json.dumps({'text': t}).encode() for t in GOOD[:100]])) + 1}" in str(
        skipped.reasons
    )
    assert reason in skipped.reasons[0]


def test_a_line_without_end_is_passed_over_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_rows, "LINE_LIMIT", 1000)
    texts, skipped = read(lines(tmp_path, b'{"text": "' + b"x" * 3_000_000 + b'"}'))
    assert texts == GOOD
    assert skipped.reasons[0].endswith("longer than 0 MB")
    write(tmp_path, {"endless.jsonl": b"y" * 5_000_000})
    assert read(tmp_path / "endless.jsonl")[0] == []


def test_too_many_bad_rows_are_another_format(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"26 rows cannot be used beside 100 good ones, 5% may be bad: rows\.jsonl, byte"):
        read(lines(tmp_path, *[b"#"] * 40))
    assert len(read(lines(tmp_path, *[b"#"] * 20))[0]) == 200


def test_blank_lines_and_another_field(tmp_path: Path) -> None:
    write(tmp_path, {"a.ndjson": b'\n{"body": "first"}\r\n\n{"body": " "}\n{"body": "second"}'})
    assert read(tmp_path, "body")[0] == ["first", "second"]


def rows(file: Path, field: str = "text", offset: int = 0) -> list[tuple[bytes, str]]:
    """What the child tells, without a child."""
    return list(corpus_parquet_child.frames(file, file.name, field, offset))


def good(texts: list[str]) -> list[tuple[bytes, str]]:
    return [(b"T", text) for text in texts]


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "brotli"])
@pytest.mark.parametrize("how", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}])
def test_parquet_is_read_and_gone_on_with(codec: str, how: dict[str, Any], tmp_path: Path) -> None:
    file = parquet(tmp_path, GOOD, compression=codec, row_group_size=70, **how)
    for offset in (0, 1, 69, 70, 71, 150, 199, 200):
        assert rows(file, offset=offset) == good(GOOD[offset:])


def test_rows_come_out_of_a_process_of_their_own(tmp_path: Path) -> None:
    file = parquet(tmp_path, [None, *GOOD, "zwölf", " ", "x\0"], row_group_size=70)
    texts, skipped = read(file)
    assert texts == [*GOOD, "zwölf"]
    assert (skipped.rows, skipped.used) == (2, 201)
    assert skipped.reasons == [
        "rows.parquet, row 1: its 'text' is missing",
        "rows.parquet, row 204: its text holds a zero byte",
    ]
    found = list(open_source(file).read(0, 150, Skipped()))
    assert [piece.text for piece in found] == [*GOOD[149:], "zwölf"]
    assert found[0].after == 151


@pytest.mark.parametrize(
    "column",
    [
        pa.array(GOOD, pa.large_string()),
        pa.array(GOOD).dictionary_encode(),
    ],
)
def test_other_kinds_of_text(column: Any, tmp_path: Path) -> None:
    assert rows(parquet(tmp_path, column)) == good(GOOD)


def test_cells_that_are_no_utf8_are_skipped(tmp_path: Path) -> None:
    data = pa.array([b"\xff\xfe", *[text.encode() for text in GOOD]], pa.binary())
    forged = pa.StringArray.from_buffers(len(data), *data.buffers()[1:])
    assert rows(parquet(tmp_path, forged)) == [(b"B", "no UTF-8: invalid start byte"), *good(GOOD)]


def test_the_column_must_be_there_and_hold_text(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"rows\.parquet has no column 'text': choose one of body"):
        read(parquet(tmp_path, GOOD, "body"))
    assert rows(parquet(tmp_path, GOOD, "body"), "body") == good(GOOD)
    for column in (list(range(5)), [["a"]], [{"a": "b"}]):
        with pytest.raises(Invalid, match="text expected"):
            rows(parquet(tmp_path, column))


def test_a_bomb_of_one_long_text_in_every_row_is_refused(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 2**20]))
    file = parquet(tmp_path, column, compression="zstd")
    assert file.stat().st_size < 2000, "100 GB in a kilobyte"
    with pytest.raises(Invalid, match="unpacks to over 1000 times its size"):
        read(file)


def test_a_bomb_of_one_endless_text_is_never_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_parquet_child, "LINE_LIMIT", 1000)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 2**20]))
    assert rows(parquet(tmp_path, column)) == [(b"B", "longer than 0 MB")] * 1000


def test_a_bomb_of_blank_rows_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_parquet_child, "UNPACK_FREE", 1000)
    monkeypatch.setattr(corpus_parquet_child, "UNPACK_LIMIT", 10)
    with pytest.raises(Invalid, match="unpacks to over"):
        rows(parquet(tmp_path, [""] * 100_000))


def test_a_row_group_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_parquet_child, "GROUP_LIMIT", 2**20)
    file = parquet(tmp_path, ["y" * 10_000 + str(n) for n in range(300)], compression="zstd", use_dictionary=False)
    with pytest.raises(Invalid, match="unpacks to 2 MB, at most 1 expected: write it with smaller row groups"):
        rows(file)


def test_front_coded_text_is_unpacked_a_row_at_a_time(tmp_path: Path) -> None:
    how = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    for version in ("1.0", "2.0"):
        file = parquet(tmp_path, GOOD, data_page_version=version, **how)
        assert rows(file) == good(GOOD)
        column = pq.ParquetFile(file).metadata.row_group(0).column(0)
        with file.open("rb") as raw:
            assert scan_pages(raw, column.data_page_offset, column.total_compressed_size).front_coded


def test_page_headers_say_what_the_footer_says(tmp_path: Path) -> None:
    for how in ({}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"write_page_checksum": True}):
        file = parquet(tmp_path, GOOD * 50, data_page_size=1000, compression="zstd", **how)
        column = pq.ParquetFile(file).metadata.row_group(0).column(0)
        start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
        with file.open("rb") as raw:
            pages = scan_pages(raw, start, column.total_compressed_size)
        # the footer counts the headers as well, some tens of bytes for each page
        assert 0.8 * column.total_uncompressed_size < pages.unpacked_bytes <= column.total_uncompressed_size
        assert not pages.front_coded


def number(value: int) -> bytes:
    """In thrift's compact protocol."""
    value, out = value << 1, b""
    while value > 127:
        value, out = value >> 7, out + bytes([value & 127 | 128])
    return out + bytes([value])


def test_a_page_that_claims_more_than_its_footer_is_believed(tmp_path: Path) -> None:
    header = b"\x15\x00\x15" + number(2**30) + b"\x15" + number(5) + b"\x00"
    (tmp_path / "pages").write_bytes(b"PAR1" + (header + b"12345") * 2)
    with (tmp_path / "pages").open("rb") as raw:
        assert scan_pages(raw, 4, 2 * len(header) + 10) == Pages(2**31, False)
        for size in (1, len(header) - 1, len(header) + 4, len(header) + 9):
            with pytest.raises(Invalid):
                scan_pages(raw, 4, size)


@given(st.binary(max_size=200))
def test_what_is_no_page_is_refused(data: bytes) -> None:
    import io

    if data:
        try:
            scan_pages(io.BytesIO(data), 0, len(data))
        except Invalid:
            return


def damaged(tmp_path: Path, places: list[int], **how: Any) -> list[str]:
    """What reading says when a bit at each of these places is flipped; it may say nothing."""
    sound, rng, said = parquet(tmp_path, GOOD, row_group_size=100, **how).read_bytes(), random.Random(1), []
    for place in places:
        place %= len(sound)
        (tmp_path / "rows.parquet").write_bytes(
            bytes([*sound[:place], sound[place] ^ (1 << rng.randrange(8)), *sound[place + 1 :]])
        )
        try:
            read(tmp_path / "rows.parquet")
        except Invalid as error:
            said.append(error.message)
    return said


def test_damage_is_named(tmp_path: Path) -> None:
    assert "smaller than the size reported" in damaged(tmp_path, [-5])[0]
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(Invalid, match=r"rows\.parquet is no sound Parquet file: ArrowInvalid: Parquet file size is 0"):
        read(tmp_path / "rows.parquet")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "how",
    [
        {"compression": "snappy"},
        {"use_dictionary": False, "data_page_version": "2.0", "compression": "zstd"},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ],
)
def test_damage_anywhere_is_named_or_does_no_harm(how: dict[str, Any], tmp_path: Path) -> None:
    said = damaged(tmp_path, list(range(0, 1800, 13)), **how)
    assert said, "some damage is found"
    assert all("rows.parquet" in reason for reason in said)


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        ("import os; os.abort()", r"its reader died of it \(exit code -6\)"),
        ("import sys; sys.stdout.buffer.write(b'T' + bytes([9, 0, 0, 0]) + b'abc')", "its reader died of it"),
        ("import sys; sys.stdout.buffer.write(b'Q' * 100)", "it confused its reader"),
        ("import sys; sys.stdout.buffer.write(b'T' + bytes([255] * 4) + b'abc')", "it confused its reader"),
        ("import time; time.sleep(60)", "no row came out of it in 1 s"),
    ],
)
def test_a_reader_that_the_file_killed_or_captured_is_not_believed(
    reader: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_parquet, "_READER", (sys.executable, "-S", "-c", reader))
    monkeypatch.setattr(corpus_parquet, "ANSWER_S", 1.0)
    with pytest.raises(Invalid, match=rf"rows\.parquet is no sound Parquet file: {reason}"):
        read(parquet(tmp_path, GOOD))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path, GOOD)
    monkeypatch.setattr(corpus_parquet, "find_spec", lambda name: None)
    with pytest.raises(Invalid, match=r"needs pyarrow: pip install 'tessera-network\[data\]'"):
        open_source(file)
    write(tmp_path / "other", {"a.txt": b"text"})
    open_source(tmp_path / "other")
