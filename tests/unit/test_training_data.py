"""A run's batches: the same everywhere, mixed by recipe, from no more shards than the schedule needs soon."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from data_world import put_dataset, random_ids
from tessera.core.errors import Conflict, Invalid, Unavailable
from tessera.core.ids import BlobId
from tessera.core.signing import AccountKey
from tessera.models.dataset import DatasetIndex
from tessera.models.presets import tiny_spec
from tessera.p2p.blobs import BlobStore
from tessera.p2p.memory import run_virtual
from tessera.training import data as data_module
from tessera.training.data import NamedBatches, apportion, open_batches
from tessera.training.manifest import Allocation, DataRecipe, DataSet, Manifest, Part, Schedule
from training_world import small_manifest

OWNERS = [AccountKey(bytes([n]) * 32).account for n in (5, 6)]
ACTIVE, LENGTH, SHARD = 3, 16, 400
STEPS = 400


@dataclass
class World:
    """A store with data sets, and a worker's disk that fetches from it."""

    store: BlobStore
    manifest: Manifest
    disk: dict[BlobId, Path] = field(default_factory=dict)
    fetched: list[BlobId] = field(default_factory=list)
    most: int = 0
    broken: set[BlobId] = field(default_factory=set)
    delay_s: float = 0.0

    async def fetch(self, blob: BlobId) -> Path:
        await anyio.sleep(self.delay_s)
        if blob in self.broken:
            raise Unavailable("no peer has it")
        self.fetched.append(blob)
        self.disk[blob] = self.store.path(blob)
        self.most = max(self.most, len(self.disk))
        return self.disk[blob]

    def release(self, blob: BlobId) -> None:
        self.disk.pop(blob, None)

    async def open(self, folder: Path) -> NamedBatches:
        await anyio.Path(folder).mkdir(exist_ok=True)
        return await open_batches(self.manifest, self.fetch, self.release, folder)


INDEXES: dict[object, BlobId] = {}
STORES: dict[object, BlobStore] = {}  # written once: nothing here changes a store


@pytest.fixture(scope="module", autouse=True)
def _stores() -> Iterator[None]:
    yield
    STORES.clear()
    INDEXES.clear()


def make_world(folder: Path, weights: tuple[int, ...] = (1,), shards: int = 40, validation: int = 200) -> World:
    store = STORES.setdefault((weights, shards, validation), BlobStore(folder / "store"))
    tokenizer = store.put(b"any tokenizer")
    sets = []
    for number, weight in enumerate(weights):
        # set 0 holds ids below 150, set 1 the others
        if (index := INDEXES.get((weights, shards, validation, number))) is None:
            train = [random_ids(100 * number + n, SHARD, 150) + 150 * number for n in range(shards)]
            index = put_dataset(store, 300, tokenizer, train, random_ids(7, validation, 150) + 150 * number)
            INDEXES[weights, shards, validation, number] = index
        sets.append(DataSet(index=index, weight=weight, account=OWNERS[number]))
    manifest = small_manifest().model_copy(
        update={
            "model": tiny_spec(2),
            "data": DataRecipe(tokenizer=tokenizer, sets=tuple(sets), active=ACTIVE),
            "schedule": Schedule(
                steps=STEPS, microbatches=2, sequences=2, length=LENGTH, evaluate_every=5, evaluate_batches=4,
                epoch_steps=5,
            ),
            "allocation": Allocation(
                work=9000,
                data=tuple(Part(account=owner, bps=100) for owner in OWNERS[: len(weights)]),
                creator=Part(account=OWNERS[0], bps=1000 - 100 * len(weights)),
            ),
        }
    )  # fmt: skip
    return World(store, Manifest.parse(manifest.canonical))


async def read(batches: NamedBatches, steps: range) -> list[np.ndarray]:
    found = []
    for step in steps:
        await batches.ready(step)
        found += [batches.train(step, index) for index in range(2)]
    return found


@pytest.mark.anyio
async def test_a_worker_never_holds_more_than_its_schedule_needs_soon(tmp_path: Path) -> None:
    """40 shards, three mixed at a time: at most six, the index and the validation shard are on disk."""
    world = make_world(tmp_path)
    batches = await world.open(tmp_path / "run")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(batches.keep_ahead)
        for step in range(STEPS):
            await batches.ready(step)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            assert batches.train(step, 1).shape == (2, LENGTH + 1)
            assert len(world.disk) <= 2 * ACTIVE + 2
        tasks.cancel_scope.cancel()
    assert world.most <= 2 * ACTIVE + 2
    per_pass = 40 * ((SHARD - LENGTH) // LENGTH)
    passes = STEPS * 4 / per_pass
    assert passes > 1.5, "the test goes round more than once"
    assert len(world.fetched) <= 2 + 40 * (passes + 1)


def test_what_comes_next_is_here_before_it_is_due(tmp_path: Path) -> None:
    """A fetch takes ten steps' time; only the first group is waited for."""

    async def main() -> list[float]:
        world = make_world(tmp_path)
        world.delay_s = 3.0
        batches = await world.open(tmp_path / "run")
        waits = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(batches.keep_ahead)
            for step in range(100):
                started = anyio.current_time()
                await batches.ready(step)
                waits.append(anyio.current_time() - started)
                await anyio.sleep(1.0)
            tasks.cancel_scope.cancel()
        return waits

    waits = run_virtual(main)
    assert waits[0] > 0
    assert waits[1:] == [0.0] * 99


@pytest.mark.anyio
async def test_a_restart_in_the_middle_fetches_only_what_it_needs_and_lets_go_of_the_rest(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    await read(await world.open(tmp_path / "run"), range(30))
    before = set(world.disk)
    world.fetched.clear()
    again = await world.open(tmp_path / "run")
    middle = await read(again, range(250, 252))
    fixed = {BlobId(world.manifest.data.sets[0].index), index_of(world).validation.blob}
    assert set(world.fetched) == set(world.disk)
    assert len(world.disk.keys() - fixed) <= 2 * ACTIVE
    assert before - fixed - set(world.fetched), "the first life held shards that the second has no use for"
    other = make_world(tmp_path)
    whole = await read(await other.open(tmp_path / "other"), range(252))
    assert all(np.array_equal(a, b) for a, b in zip(middle, whole[-4:], strict=True))


def index_of(world: World, number: int = 0) -> DatasetIndex:
    return DatasetIndex.parse(world.store.path(BlobId(world.manifest.data.sets[number].index)).read_bytes())


@pytest.mark.anyio
async def test_two_sets_are_drawn_in_proportion_and_each_keeps_few_shards(tmp_path: Path) -> None:
    world = make_world(tmp_path, weights=(3, 1))
    batches = await world.open(tmp_path / "run")
    rows = np.concatenate(await read(batches, range(100)))
    of_second = (rows >= 150).all(axis=1)
    assert ((rows >= 150).any(axis=1) == of_second).all(), "a window comes from one set"
    assert int(of_second.sum()) == 100, "one in four of 400 windows"
    assert world.most <= 2 * (2 * ACTIVE + 2)
    validation = np.concatenate([batches.validation(i) for i in range(batches.validation_count)])
    assert Counter((validation >= 150).all(axis=1).tolist()) == {False: 6, True: 2}


@pytest.mark.anyio
async def test_batches_are_windows_of_the_shards_and_differ_by_run(tmp_path: Path) -> None:
    world = make_world(tmp_path, shards=2)
    batches = await world.open(tmp_path / "run")
    text = [np.fromfile(world.store.path(shard.blob), "<u2") for shard in index_of(world).train]
    found = await read(batches, range(5))
    for row in np.concatenate(found):
        windows = [np.lib.stride_tricks.sliding_window_view(ids, LENGTH + 1) for ids in text]
        assert any((view == row).all(axis=1).any() for view in windows)
    world.manifest = world.manifest.model_copy(update={"name": "another"})
    other = await read(await world.open(tmp_path / "b"), range(5))
    assert not any(np.array_equal(a, b) for a, b in zip(found, other, strict=True))


@pytest.mark.anyio
async def test_a_shard_that_nobody_has_is_named_and_asked_for_again(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    batches = await world.open(tmp_path / "run")
    with pytest.raises(Conflict, match="`ready` comes first"):
        batches.train(0, 0)
    world.broken = {shard.blob for shard in index_of(world).train}
    with pytest.raises(Unavailable, match="no peer has it"):
        await batches.ready(0)
    world.broken = set()
    await batches.ready(0)
    assert batches.train(0, 0).shape == (2, LENGTH + 1)


def test_fetching_ahead_survives_an_absent_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        world = make_world(tmp_path)
        batches = await world.open(tmp_path / "run")
        await batches.ready(0)
        world.broken = {shard.blob for shard in index_of(world).train} - set(world.disk)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(batches.keep_ahead)
            await batches.ready(1)
            await anyio.sleep(20)
            world.broken = set()
            await anyio.sleep(2 * data_module.RETRY_S)
            assert len(world.disk) == 2 * ACTIVE + 2
            tasks.cancel_scope.cancel()

    run_virtual(main)


@pytest.mark.anyio
async def test_two_who_ask_at_once_fetch_once(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.delay_s = 0.01
    batches = await world.open(tmp_path / "run")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(batches.ready, 0)
        tasks.start_soon(batches.ready, 0)
    assert max(Counter(world.fetched).values()) == 1


@pytest.mark.anyio
async def test_sets_that_do_not_fit_the_run_are_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    for change, message in (
        ({"vocab_size": 301}, "has 301 tokens, the model expects 300"),
        ({"tokenizer": BlobId("ee" * 32)}, r"cut by tokenizer eeee.*`tessera data add --tokenizer"),
    ):
        value = index_of(world)
        fields = {name: getattr(value, name) for name in value.__slots__}
        wrong = world.store.put(DatasetIndex(**{**fields, **change}).to_bytes())
        recipe = world.manifest.data.model_copy(update={"sets": (DataSet(index=wrong, weight=1, account=OWNERS[0]),)})
        other = World(world.store, world.manifest.model_copy(update={"data": recipe}))
        with pytest.raises(Invalid, match=message):
            await other.open(tmp_path / "run")
    with pytest.raises(Invalid, match="validation text holds 1 windows, at least 2 needed"):
        await make_world(tmp_path / "short", validation=LENGTH + 1).open(tmp_path / "run")


@pytest.mark.anyio
async def test_an_unreadable_note_of_what_is_held_costs_nothing_but_the_note(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    await read(await world.open(tmp_path / "run"), range(1))
    for damage in (b"", b"{}", b"[1]", b"[" * 5_000_000):
        (tmp_path / "run" / data_module.HELD).write_bytes(damage)
        await read(await world.open(tmp_path / "run"), range(1))


def test_apportioning_is_exact() -> None:
    assert apportion(8, [3, 1]) == [6, 2]
    assert apportion(1, [1, 1, 1]) == [1, 0, 0]
    assert sum(apportion(64, [7, 11, 13])) == 64
