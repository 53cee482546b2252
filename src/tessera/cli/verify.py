"""`tessera verify`: a member replays the operator's ledger and compares it with what others were shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tessera.chain.genesis import Genesis
from tessera.chain.heads import SignedHead, check_operator
from tessera.core.errors import Invalid, Refused
from tessera.devnet.access import open_run
from tessera.training.home import write_atomic

__all__ = ["HEADS", "read_heads", "run_verify"]

HEADS = "heads.jsonl"  # in the state directory: what the operator signed for us, one a line
KEPT = 100
FILE_LIMIT = 1 << 20  # bytes of a file of heads
UNKNOWN_METHOD = -32601


async def run_verify(state_dir: Path, seen: Sequence[Path], as_json: bool) -> None:
    """Raises: as `check_operator`."""
    own = read_heads(state_dir / HEADS) if (state_dir / HEADS).exists() else []
    others = [head for file in seen for head in read_heads(file)]
    operator = own[-1].signer if own else None  # whoever signed for us first
    async with open_run(state_dir) as run:
        chain_id = await run.chain.chain_id()
        try:
            found = await check_operator(run.chain.request, chain_id, operator=operator, seen=[*own, *others])
        except Invalid as error:
            if error.fields.get("rpc_code") != UNKNOWN_METHOD:
                raise
            raise Refused(f"chain {chain_id} is no ledger of one operator: it needs no replay", rule="chain") from error
    heads = [*own, *([] if own and own[-1] == found.head else [found.head])][-KEPT:]
    write_atomic(state_dir / HEADS, "".join(json.dumps(head.to_value()) + "\n" for head in heads).encode())
    facts = {
        "operator": found.head.signer, "block": found.head.number, "hash": "0x" + found.head.hash.hex(),
        "state_root": "0x" + found.state_root.hex(), "compared_with": len(own) + len(others),
        "standard_contracts": found.genesis.contracts == Genesis().contracts, "heads": str(state_dir / HEADS),
    }  # fmt: skip
    if as_json:
        print(json.dumps(facts))  # noqa: T201  the command's result
        return
    text = (
        f"Replayed {facts['block']} blocks of {facts['operator']}; they lead where it says, and agree with "
        f"{facts['compared_with']} heads that were shown before.\nGive {facts['heads']} to other members; they run "
        f"tessera verify --seen FILE, and you the same with theirs."
    )
    Console().print(text, highlight=False, soft_wrap=True)


def read_heads(file: Path) -> list[SignedHead]:
    """One a line. Raises `Invalid` for a file that holds anything else."""
    try:
        text = file.read_bytes()
        if len(text) > FILE_LIMIT:
            raise Invalid(f"{file} has {len(text)} bytes, at most {FILE_LIMIT} expected")
        return [SignedHead.from_value(json.loads(line)) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise Invalid(f"{file} cannot be read as heads: {error}") from error
