"""`tessera run create` and `tessera run show`: manifests as files."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tessera.core.errors import Invalid
from tessera.devnet.plan import UpConfig, make_manifest
from tessera.training.manifest import Manifest

__all__ = ["create_run", "show_run"]


def create_run(out: Path, config: UpConfig, chain_id: int) -> None:
    """Prepare the text, write the manifest, print its run id. Raises `Conflict` when the state directory is in use."""
    from tessera.devnet.people import load_people
    from tessera.devnet.text import prepare_text
    from tessera.p2p.blobs import BlobStore
    from tessera.training.home import Home, write_atomic

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


def show_run(file: Path, as_json: bool) -> None:
    """Print what the manifest in `file` says. Raises `Invalid` for a file that is none."""
    try:
        manifest = Manifest.parse(file.read_bytes())
    except OSError as error:
        raise Invalid(f"cannot read {file}: {error.strerror}") from error
    facts = _facts(manifest)
    if as_json:
        print(json.dumps(facts))  # noqa: T201  the command's result
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    Console().print(table, highlight=False)


def _facts(manifest: Manifest) -> dict[str, object]:
    spec, schedule = manifest.model, manifest.schedule
    return {
        "run_id": manifest.run_id,
        "name": manifest.name,
        "chain_id": manifest.chain_id,
        "stages": spec.stages,
        "layers": [len(cut) for cut in spec.cuts()],
        "codec": spec.codec.kind,
        "bytes_per_token": spec.message_bytes_per_token(),
        "dense_bytes_per_token": spec.dense_bytes_per_token(),
        "steps": schedule.steps,
        "tokens": schedule.steps * manifest.tokens_per_step,
        "flops_per_token": [spec.flops_per_token(stage) for stage in range(spec.stages)],
        "epochs": schedule.epochs,
        "allocation_bps": {
            "work": manifest.allocation.work,
            **{f"{owner.role} {owner.account}": owner.bps for owner in manifest.owners},
        },
        "pay_to": manifest.pay_to,
        "price_units": manifest.price_units,
    }
