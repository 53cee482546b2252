"""`tessera run …`: draft a manifest, create its run, look at runs, invite to them, pause and close them."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tessera.core.errors import Conflict, Invalid, Missing
from tessera.core.ids import RunId, parse_run_id
from tessera.devnet.plan import UpConfig, make_manifest
from tessera.devnet.tables import MARK, hosted_tables
from tessera.training.home import Home
from tessera.training.manifest import WHOLE_BPS, Manifest, Settlement
from tessera.training.wishes import Wish, make_wish, read_wish

__all__ = [
    "draft_run",
    "find_manifest",
    "invite_to_run",
    "list_invitations",
    "list_runs",
    "revoke_invitation",
    "settlement_of",
    "show_run",
    "wish_run",
]

HOUR_S = 3600


def draft_run(out: Path, config: UpConfig, chain_id: int) -> None:
    """Prepare the text, write the manifest, print its run id. Raises `Conflict` when the state directory is in use."""
    from tessera.devnet.people import load_people
    from tessera.devnet.text import prepare_text
    from tessera.p2p.blobs import BlobStore
    from tessera.training.home import write_atomic

    home = Home(config.state_dir)
    with home.locked():
        text = prepare_text(config.data, BlobStore(home.blobs), home.path / "text.json")
        people = load_people(home)
        manifest = make_manifest(
            config, text, chain_id=chain_id, data_owner=people.data_owner.account, creator=people.creator.account
        )
    try:
        write_atomic(out, json.dumps(json.loads(manifest.canonical), indent=2).encode() + b"\n")
    except OSError as error:
        raise Invalid(f"cannot write {out}: {error.strerror}") from error
    Console().print(f"run {manifest.run_id}\nwritten to {out}", highlight=False)


def settlement_of(stake: int, window_s: int, delay_s: int, early_weight: float) -> Settlement:
    """As typed. Raises `Invalid` naming what is out of range."""
    try:
        return Settlement(
            stake_units=stake, window_s=window_s, delay_s=delay_s, early_bps=round(early_weight * WHOLE_BPS)
        )
    except ValidationError as error:
        what = error.errors()[0]
        raise Invalid(f"{'.'.join(map(str, what['loc'])) or 'the terms'}: {what['msg']}") from error


def list_runs(state_dir: Path, as_json: bool) -> None:
    """The runs that this directory hosts or works in, newest last."""
    home = Home.existing(state_dir)
    rows = [_run_row(home, run_id) for run_id in home.runs()]
    if as_json:
        print(json.dumps(rows))  # noqa: T201  the command's result
        return
    if not rows:
        Console().print("No run yet. `tessera run create MANIFEST` opens one, `tessera join INVITATION` joins one.")
        return
    table = Table("run", "name", "stages", "tokens", "part", "state", box=None)
    for row in rows:
        short = {
            **row,
            "run_id": f"{row['run_id']}"[:16],
            "tokens": f"{row['tokens']:,}" if isinstance(row["tokens"], int) else "?",
        }
        table.add_row(*(str(short[key]) for key in ("run_id", "name", "stages", "tokens", "part", "state")))
    Console().print(table, highlight=False)


def show_run(what: str, state_dir: Path, as_json: bool) -> None:
    """Print what a manifest says: a file, or a run of this directory by the first digits of its id."""
    facts = _facts(find_manifest(what, state_dir))
    if as_json:
        print(json.dumps(facts))  # noqa: T201  the command's result
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table, highlight=False)


def wish_run(state_dir: Path, run: str, wish: Wish) -> None:
    """Have the host pause, resume or close a run. It follows within a second, or at its next start."""
    home = Home.existing(state_dir)
    run_id = _find(home, run)
    if not (home.run_folder(run_id) / MARK).exists():
        raise Missing(f"{state_dir} does not host run {run_id[:16]}…: only its host may pause or close it")
    make_wish(home.run_folder(run_id), wish)
    done = {"pause": "pauses", "work": "goes on", "close": "closes"}[wish]
    Console().print(f"Run {run_id[:16]}… {done}.")


def invite_to_run(state_dir: Path, run: str, database: str, *, seats: int, hours: float, label: str) -> None:
    """Print a new invitation to a run that is hosted here. The host may be at work meanwhile."""
    from tessera.core.clock import SystemClock
    from tessera.devnet.invitations import Door, last_invitation

    if not 0 < hours <= 24 * 366:
        raise Invalid(f"an invitation lasts between a moment and a year, not {hours:g} hours")
    home, clock = Home.existing(state_dir), SystemClock()
    run_id = _find(home, run)
    first = last_invitation(home, clock, even_expired=True)
    if first.run_id != run_id:
        raise Conflict(f"{state_dir} last hosted run {first.run_id[:16]}…: start {run_id[:16]}… first")
    book = hosted_tables(home, run_id, database).seats()
    try:
        door = Door(home, book, run_id, first.chain_id, first.host, clock, first.relays)
        invitation = door.invite(seats, lasts_s=int(hours * HOUR_S), label=label)
    finally:
        book.close()
    console = Console(stderr=True)
    console.print(f"Invitation {invitation.id}, for {seats} seat{'s' if seats > 1 else ''}, {hours:g} hours:")
    Console().print(Text(f"tessera join {invitation.to_text()}"), soft_wrap=True, highlight=False)


def revoke_invitation(state_dir: Path, run: str, database: str, name: str) -> None:
    """Take an invitation back: whoever has a seat keeps it, nobody new gets one. `name` may be its first digits."""
    home = Home.existing(state_dir)
    book = hosted_tables(home, _find(home, run), database).seats()
    try:
        known = [invitation for invitation in book.invitations() if invitation.id.startswith(name)]
        if len(known) != 1:
            raise Missing(f"{len(known)} invitations begin with {name!r}: `tessera run show` lists them")
        book.revoke_invitation(known[0].id)
    finally:
        book.close()
    Console().print(f"Invitation {known[0].id} is taken back.")


def list_invitations(state_dir: Path, run: str, database: str, as_json: bool) -> None:
    """The invitations to a run that is hosted here: what they are for, until when, who used them."""
    home = Home.existing(state_dir)
    book = hosted_tables(home, _find(home, run), database).seats()
    try:
        known = book.invitations()
    finally:
        book.close()
    if as_json:
        rows = [
            {"id": i.id, "seats": i.seats, "used": len(i.users), "expires": i.expires, "revoked": i.revoked,
             "label": i.label}
            for i in known
        ]  # fmt: skip
        print(json.dumps(rows))  # noqa: T201  the command's result
        return
    table = Table("invitation", "seats", "used", "until", "state", "for", box=None)
    for i in known:
        state = "taken back" if i.revoked else "expired" if i.expires < time.time() else "open"
        until = datetime.fromtimestamp(i.expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
        table.add_row(i.id[:12], str(i.seats), str(len(i.users)), until, state, i.label)
    Console().print(table, highlight=False)


# --- inside -----------------------------------------------------------------------------------------------------------


def find_manifest(what: str, state_dir: Path) -> Manifest:
    """A manifest's file, or the run of this directory that `what` names by its first digits; the newest for ""."""
    file = Path(what)
    if not what or not file.exists():
        home = Home.existing(state_dir)
        file = home.run_folder(_find(home, what)) / "manifest.json"
    try:
        return Manifest.parse(file.read_bytes())
    except OSError as error:
        raise Invalid(f"cannot read {file}: {error.strerror}") from error


def _find(home: Home, run: str) -> RunId:
    """The run that `run` names by its first digits; the newest for an empty name."""
    runs = home.runs()
    known = [run_id for run_id in runs if run_id.startswith(run)] if run else runs[-1:]
    if len(known) == 1:
        return parse_run_id(known[0])
    raise Missing(f"{len(known)} runs in {home.path} begin with {run!r}: `tessera run list` names them")


def _run_row(home: Home, run_id: RunId) -> dict[str, object]:
    folder = home.run_folder(run_id)
    row: dict[str, object] = {"run_id": run_id, "name": "?", "stages": "?", "tokens": "?"}
    if (folder / "manifest.json").exists():
        manifest = Manifest.parse((folder / "manifest.json").read_bytes())
        tokens = manifest.schedule.steps * manifest.tokens_per_step
        row |= {"name": manifest.name, "stages": manifest.model.stages, "tokens": tokens}
    row["part"] = "host" if (folder / MARK).exists() else "worker"
    row["state"] = {"work": "open", "pause": "paused", "leave": "leaving", "close": "closed"}[read_wish(folder)]
    return row


def _facts(manifest: Manifest) -> dict[str, object]:
    spec, schedule = manifest.model, manifest.schedule
    return {
        "run_id": manifest.run_id,
        "name": manifest.name,
        "chain_id": manifest.chain_id,
        "stages": spec.stages,
        "replicas": manifest.replicas,
        "most_replicas": manifest.most_replicas,
        "layers": [len(cut) for cut in spec.cuts()],
        "codec": spec.codec.kind,
        "bytes_per_token": spec.message_bytes_per_token(),
        "dense_bytes_per_token": spec.dense_bytes_per_token(),
        "steps": schedule.steps,
        "tokens": schedule.steps * manifest.tokens_per_step,
        "flops_per_token": [spec.flops_per_token(stage) for stage in range(spec.stages)],
        "epochs": schedule.epochs,
        **manifest.settlement.model_dump(),
        "allocation_bps": {
            "work": manifest.allocation.work,
            **{f"{owner.role} {owner.account}": owner.bps for owner in manifest.owners},
        },
        "pay_to": manifest.pay_to,
        "price_units": manifest.price_units,
    }
