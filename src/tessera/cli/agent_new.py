"""`tessera agent new`: the folder of an agent, its keys, its definition, and a mandate signed by the payer."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tessera.agents.mandates import Mandate, asset_id, sign_mandate
from tessera.agents.runtime.home import DEFINITION, AgentHome
from tessera.chain.client import RpcChain
from tessera.chain.faces import Coin
from tessera.chain.rpc import HttpRpc
from tessera.core.amount import Amount
from tessera.core.errors import Conflict, Invalid
from tessera.core.ids import parse_account
from tessera.core.signing import AccountKey
from tessera.training.files import write_atomic
from tessera.training.keystore import Keyring

__all__ = ["MandateTerms", "NewAgent", "run_new"]

DAY_S = 86_400
KEYS = ("agent", "approver", "payer")
DEMO_FILES = ("mailbox.py", "script.json")


@dataclass(frozen=True, slots=True)
class MandateTerms:
    """What the agent may pay."""

    chain: str
    coin: str
    per_payment: int
    per_day: int
    approve_above: int
    payees: tuple[str, ...]
    days: int


@dataclass(frozen=True, slots=True)
class NewAgent:
    """What was asked for."""

    folder: Path
    model: str
    model_url: str
    api_key_env: str
    demo: bool
    approver: str
    terms: MandateTerms | None


async def run_new(wanted: NewAgent, as_json: bool) -> None:
    """Raises: Conflict when the agent is there already: nothing is overwritten."""
    folder = wanted.folder
    if not wanted.demo and not wanted.model:
        raise Invalid("say --model NAME, what the model is called at --model-url; or --demo, which needs none")
    if (folder / DEFINITION).exists():
        raise Conflict(f"{folder / DEFINITION} exists: nothing was changed")
    keys = folder / "keys"
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    ring = Keyring(keys)
    names = [name for name in KEYS if name != "approver" or not wanted.approver]
    for name in names:
        ring.ensure(name)
    accounts = {entry.name: entry.address for entry in ring.entries()}
    if wanted.approver:
        accounts["approver"] = parse_account(wanted.approver)
    wallet = ""
    if wanted.terms is not None:
        mandate, wallet = await _mandate(wanted.terms, accounts)
        signed = sign_mandate(mandate, AccountKey(ring.secret("payer")))
        write_atomic(folder / "mandate.json", signed.encode())
    if wanted.demo:
        for name in DEMO_FILES:
            write_atomic(folder / name, files("tessera.agents.runtime").joinpath("demo", name).read_bytes())
    write_atomic(folder / DEFINITION, _definition(wanted, accounts["approver"], wallet).encode())
    AgentHome(folder)
    _show(wanted, accounts, as_json)


async def _mandate(terms: MandateTerms, accounts: dict[str, str]) -> tuple[Mandate, str]:
    """The mandate, and what the definition says of the purse."""
    if not terms.coin or terms.per_payment <= 0 or terms.per_day <= 0 or terms.days <= 0:
        raise Invalid("a mandate needs --coin, --per-payment, --per-day and --days, all above zero")
    rpc = HttpRpc(terms.chain)
    try:
        chain = RpcChain(rpc)
        coin = Coin(chain, terms.coin)
        asset = asset_id(await chain.chain_id(), coin.address)
        name, version = await coin.name(), await coin.version()
    finally:
        await rpc.aclose()
    mandate = Mandate(
        payer=parse_account(accounts["payer"]), agent=parse_account(accounts["agent"]),
        approver=parse_account(accounts["approver"]), per_payment=Amount(terms.per_payment, asset),
        per_period=Amount(terms.per_day, asset), approve_above=Amount(terms.approve_above or terms.per_payment, asset),
        expires_at=int(time.time()) + terms.days * DAY_S, payees=tuple(parse_account(payee) for payee in terms.payees),
        any_payee=not terms.payees, salt=secrets.token_hex(32),
    )  # fmt: skip
    rows = {"chain": terms.chain, "coin_name": name, "coin_version": version}
    return mandate, "\n[wallet]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rows.items())


def _definition(wanted: NewAgent, approver: str, wallet: str) -> str:
    template = files("tessera.agents.runtime").joinpath("demo", "agent.toml" if wanted.demo else "new.toml")
    lines = [f"url = {json.dumps(wanted.model_url)}", f"name = {json.dumps(wanted.model)}"]
    if wanted.api_key_env:
        lines.append(f"api_key_env = {json.dumps(wanted.api_key_env)}")
    text = template.read_text(encoding="utf-8")
    return (
        text.replace("NAME", wanted.folder.name).replace("APPROVER", approver).replace("MODEL", "\n".join(lines))
        + wallet
    )


def _show(wanted: NewAgent, accounts: dict[str, str], as_json: bool) -> None:
    name, folder = wanted.folder.name, wanted.folder
    if as_json:
        print(json.dumps({"agent": name, "folder": str(folder), "accounts": accounts}))  # noqa: T201  the result
        return
    console = Console()
    console.print(Text(f"{folder / DEFINITION} is the agent: change it as you like."), soft_wrap=True)
    for key, address in sorted(accounts.items()):
        console.print(Text(f"{key:<9} {address}"), soft_wrap=True)
    if wanted.terms is not None:
        console.print(
            Text(f"Put coins into the purse {accounts['agent']}: it can lose what is in it, and the mandate's caps."),
            soft_wrap=True,
        )
    if not wanted.approver:
        console.print(
            Text("Whoever reads this folder holds the approver's key. Safer: --approver, an account of your wallet."),
            style="dim", soft_wrap=True,
        )  # fmt: skip
    request = "Write to pal@example.com that I am late" if wanted.demo else "what you want"
    console.print(Text(f"Next: tessera agent run {name} {json.dumps(request)}"), soft_wrap=True)
