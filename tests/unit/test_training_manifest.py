"""The manifest: one hash for one meaning, and a clear word for everything that is wrong in it."""

import json
from pathlib import Path

import pytest

from tessera.core.errors import Conflict, Invalid, Misbehaviour, Missing
from tessera.core.ids import RunId
from tessera.core.signing import AccountKey
from tessera.training.home import Home, write_atomic
from tessera.training.manifest import Manifest, load_manifest
from tessera.training.roster import recall_run
from training_world import CREATOR, DATA_OWNER, small_manifest


def altered(**changes: object) -> bytes:
    value = json.loads(small_manifest().canonical)
    for path, change in changes.items():
        target = value
        *parents, name = path.split("__")
        for parent in parents:
            target = target[int(parent) if isinstance(target, list) else parent]
        target[name] = change
    return json.dumps(value).encode()


def test_the_run_id_survives_any_layout_of_the_json() -> None:
    manifest = small_manifest()
    pretty = json.dumps(json.loads(manifest.canonical), indent=2)
    assert Manifest.parse(pretty).run_id == manifest.run_id
    assert Manifest.parse(altered(name="other")).run_id != manifest.run_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise: unknown field"),
        ({"schedule__surprise": 1}, "schedule.surprise: unknown field"),
        ({"allocation__work": 8499}, "sums to 9999 basis points, expected 10000"),
        ({"pay_to": "0x12"}, "pay_to"),
        ({"price_units": -1}, "price_units"),
        ({"price_units": "10"}, "price_units"),
        ({"model__stages": 1}, "only a neighbour can sign receipts"),
        ({"data__sets__0__index": "../../etc/passwd"}, "data.sets.0.index"),
        ({"data__sets__0__weight": 0}, "data.sets.0.weight"),
        ({"data__sets": []}, "data.sets"),
        ({"data__active": 0}, "data.active"),
        ({"data__sets__0__account": str(CREATOR)}, f"allocation.data lacks {CREATOR}, who owns a data set"),
        ({"name": "<script>"}, "name"),
        ({"version": 2}, "version"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": 9}, "9 replicas to begin with, and at most 8"),
        ({"replicas": 40, "most_replicas": 40}, "a run contract takes 128 workers"),
        ({"schedule__epoch_steps": 10**6, "schedule__steps": 10**6}, "at most 50000: lower epoch_steps"),
        ({"audit__waived": False}, "only audited work is paid: that needs replicas of 2 or more, not 1"),
        ({"audit__waived": False, "audit__rate_bps": 0, "replicas": 2}, "audit.rate_bps above 0, not 0"),
        ({"audit__rate_bps": 10_001}, "audit.rate_bps"),
        (
            {"settlement__delay_s": 5, "settlement__window_s": 5},
            "delay_s is 5, expected more than window_s, which is 5",
        ),
        ({"settlement__early_bps": 9_999}, "settlement.early_bps"),
        ({"settlement__reward_bps": 5_001}, "settlement.reward_bps"),
        ({"settlement__stake_units": -1}, "settlement.stake_units"),
        ({"version": 3}, "version"),
        ({"schedule__length": 9}, "windows of 9 tokens exceed the context of 8"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(Invalid, match=message.replace(".", r"\.")):
        Manifest.parse(altered(**changes))


def test_data_earns_for_its_owners_and_for_nobody_else() -> None:
    owners = [AccountKey(bytes([n]) * 32).account for n in (7, 8)]
    sets = [{"index": f"{n}" * 64, "weight": n, "account": owners[n % 2]} for n in range(1, 4)]
    both = [{"account": owner, "bps": 500} for owner in owners]
    manifest = Manifest.parse(altered(data__sets=sets, allocation__data=both))
    assert manifest.data.accounts == (owners[1], owners[0])
    assert [part.weight for part in manifest.data.sets] == [1, 2, 3]
    for wrong, message in (
        ([{"account": owners[0], "bps": 1000}], f"lacks {owners[1]}"),
        ([*both[:1], {"account": owners[1], "bps": 0}, {"account": DATA_OWNER, "bps": 500}], f"pays {DATA_OWNER}"),
        ([*both, {"account": owners[0], "bps": 0}], f"names {owners[0]} twice"),
    ):
        with pytest.raises(Invalid, match=message):
            Manifest.parse(altered(data__sets=sets, allocation__data=wrong))
    with pytest.raises(Invalid, match="listed twice: raise its weight"):
        Manifest.parse(altered(data__sets=[sets[0], sets[0]], allocation__data=both))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b" " * 70_000])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        Manifest.parse(data)


def test_a_manifest_with_another_hash_is_misbehaviour() -> None:
    manifest = small_manifest()
    assert load_manifest(manifest.canonical, manifest.run_id) == manifest
    with pytest.raises(Misbehaviour, match="hashes to"):
        load_manifest(manifest.canonical, RunId("00" * 32))


def test_epochs_cover_every_step_once() -> None:
    schedule = small_manifest(steps=7, epoch_steps=3).schedule
    assert [list(schedule.epoch_range(e)) for e in range(schedule.epochs)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [schedule.epochs_due(done) for done in range(8)] == [0, 0, 0, 1, 1, 1, 2, 3]


def test_a_state_directory_keeps_its_keys(tmp_path: Path) -> None:
    first = Home(tmp_path / "state")
    again = Home.existing(tmp_path / "state")
    assert (first.peer_key, first.account_key) == (again.peer_key, again.account_key)
    assert (tmp_path / "state" / "account.key").stat().st_mode & 0o077 == 0


def test_of_two_processes_that_start_at_once_both_have_the_same_keys(tmp_path: Path) -> None:
    """The second one looks for the key before the first one has written it."""
    file = tmp_path / "account.key"
    write_atomic(file, b"first", replace=False)
    write_atomic(file, b"second", replace=False)
    assert file.read_bytes() == b"first"
    write_atomic(file, b"third")
    assert file.read_bytes() == b"third"
    assert [entry.name for entry in tmp_path.iterdir()] == ["account.key"]


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b'{"coin":"0x","seats":[],"share":"0x"}'])
def test_a_damaged_memory_of_a_run_is_named(content: bytes, tmp_path: Path) -> None:
    manifest = small_manifest()
    folder = tmp_path / manifest.run_id
    folder.mkdir()
    with pytest.raises(Missing, match="was never seated in this state directory"):
        recall_run(folder)
    (folder / "manifest.json").write_bytes(manifest.canonical)
    (folder / "roster.json").write_bytes(content)
    with pytest.raises(Invalid):
        recall_run(folder)


def test_two_processes_cannot_share_a_state_directory(tmp_path: Path) -> None:
    home = Home(tmp_path / "state")
    with home.locked(), pytest.raises(Conflict, match="in use by process"), Home(tmp_path / "state").locked():
        pytest.fail("both hold it")
    with home.locked():  # free again
        pass


def test_a_damaged_or_foreign_state_directory_is_named(tmp_path: Path) -> None:
    Home(tmp_path / "a")
    (tmp_path / "a" / "peer.key").write_text("zz")
    with pytest.raises(Invalid, match=r"peer\.key is damaged"):
        Home(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.doc").write_text("mine")
    with pytest.raises(Invalid, match=r"not a Tessera state directory: it holds thesis\.doc"):
        Home(tmp_path / "b")
    Home(tmp_path / "c")
    (tmp_path / "c" / "version").write_text("99")
    with pytest.raises(Invalid, match="has layout 99, of a newer Tessera; this one knows layouts up to 1"):
        Home(tmp_path / "c")
    (tmp_path / "d").write_text("a file")
    with pytest.raises(Invalid, match="cannot use"):
        Home(tmp_path / "d")
    with pytest.raises(Missing):
        Home.existing(tmp_path / "e")
