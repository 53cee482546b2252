"""A part against the simplest model of one: three strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blob_world import DATA
from tessera.p2p.blob_index import CHUNK_BYTES
from tessera.p2p.blob_store import BlobStore

Steps = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["append", "wrong", "cut", "reopen"]), st.integers(1, 700_000)),
    max_size=12,
)


@settings(max_examples=25)
@given(steps=Steps)
def test_a_part_holds_what_was_appended_whatever_happens_in_between(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str, int]]
) -> None:
    data = DATA[: 2 * CHUNK_BYTES + 300_000]
    store = BlobStore(tmp_path_factory.mktemp("part"))
    index = BlobStore(store.folder / "theirs").index(BlobStore(store.folder / "theirs").put(data))
    partial, model = store.resume(index), [b"", b"", b""]
    chunks = [data[number * CHUNK_BYTES :][:CHUNK_BYTES] for number in range(3)]
    for number, what, size in steps:
        here = len(model[number])
        if what == "cut":
            partial.cut(number, size)
            model[number] = model[number][:size]
        elif what == "reopen":
            partial.close()
            partial = store.resume(index)
            model = [m if len(m) < len(c) or m == c else b"" for m, c in zip(model, chunks, strict=True)]
        else:
            more = chunks[number][here : here + size]
            more = bytes(len(more)) if what == "wrong" else more
            partial.append(number, here, more)
            model[number] += more
    assert [partial.read(number, partial.prefix(number)) for number in range(3)] == model
    assert partial.here_bytes == sum(map(len, model))
    for number in range(3):
        partial.append(number, len(model[number]), chunks[number][len(model[number]) :])
        assert partial.keep(number) == (model[number] == chunks[number][: len(model[number])])
    partial.close()
