"""What torchrun tells, and who computes what."""

import pytest
import torch

from tessera.core.errors import Invalid
from tessera.models.parallel import share_of
from tessera.models.parallel_link import World, parallel_world
from tessera.models.parallel_place import piece

TOLD = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_without_torchrun_there_is_no_world() -> None:
    assert parallel_world({}) is None
    assert parallel_world({"RANK": "0"}) is None
    assert parallel_world(TOLD | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}) is None


def test_torchrun_gives_each_process_its_place() -> None:
    world = parallel_world(TOLD)
    assert world == World(3, 4, 1, 2)
    assert world.device("cpu") == "cpu"


@pytest.mark.parametrize(
    "wrong", [{"RANK": "4"}, {"RANK": "-1"}, {"RANK": "x"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "5"}]
)
def test_a_place_that_does_not_exist_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(Invalid, match=f"{next(iter(wrong))}='{next(iter(wrong.values()))}'"):
        parallel_world(TOLD | wrong)


def test_a_rank_takes_no_device_of_its_own_choice() -> None:
    with pytest.raises(Invalid, match="torchrun gives each its own device"):
        World(0, 2, 0, 2).device("cuda:1")
    if not torch.cuda.is_available():
        assert World(0, 2, 0, 2).device() == "cpu"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("sequences", [1, 2, 3, 7, 8])
def test_every_sequence_is_computed_once(sequences: int, size: int) -> None:
    rows = list(range(sequences))
    shares = [share_of(sequences, rank, size) for rank in range(size)]
    assert [row for share, part in shares if part for row in rows[share]] == rows
    assert all(rows[share] for share, _ in shares), "a rank without work computes the first sequence for nothing"
    counts = [len(rows[share]) for share, part in shares if part]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8, 300])
def test_pieces_are_cut_as_fsdp_cuts_them(rows: int, size: int) -> None:
    whole = torch.arange(rows)
    cut = [whole[piece(rows, rank, size)] for rank in range(size)]
    chunks = list(whole.chunk(size))
    assert torch.equal(torch.cat(cut), whole)
    assert all(torch.equal(a, b) for a, b in zip(cut, chunks, strict=False))
    assert all(len(rest) == 0 for rest in cut[len(chunks) :])
