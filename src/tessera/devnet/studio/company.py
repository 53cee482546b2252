"""The studio's agents, opened: a chain with an escrow, keys, purses, desks and mandates, all in one state directory.

Every agent has its own key, purse and desk. Two mandates are signed by people: the buyer's by a patron, the editor's by
the studio's owner; the narrator's is a child of the editor's, signed by the editor. No agent holds either person's key.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from anyio import to_thread

from tessera.agents.commerce.buyer import Buyer
from tessera.agents.commerce.cards import Card, Registry
from tessera.agents.commerce.desk import Desk
from tessera.agents.commerce.jobs import Jobs
from tessera.agents.commerce.street import Street
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import Mandate, sign_mandate
from tessera.chain.faces import IdentityRegistry, JobEscrow, ReputationRegistry
from tessera.chain.indexer.engine import Indexer
from tessera.chain.indexer.job_escrow import JOB_ESCROW, JobView
from tessera.core.amount import Amount
from tessera.core.clock import Clock
from tessera.core.errors import Invalid
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey
from tessera.devnet.ledger import Ledger, ensure_coin, give_coins, open_ledger
from tessera.devnet.studio.cast import MAKERS, PRICES, ROLES, StudioConfig
from tessera.training.home import Home, write_atomic

__all__ = ["Company", "open_company"]

GRACE_S = 60
CONTRACTS = ("escrow", "identity", "reputation")
SELLERS = tuple(dict.fromkeys(role for roles in MAKERS.values() for role in roles))
MANDATE_S = 30 * 86_400
PURSES = {"buyer": 3 * PRICES["recap"], "editor": PRICES["recap"], "narrator": 10**6, "second narrator": 10**6}


@dataclass(frozen=True)
class Company:
    """Everything that is open."""

    home: Home
    ledger: Ledger
    jobs: Jobs
    books: IntentLedger  # mandates and intents of all of them
    keys: dict[str, AccountKey]
    desks: dict[str, Desk]
    street: Street
    mandates: dict[str, Mandate]  # of those who pay
    index: Indexer
    view: JobView
    registry: Registry
    numbers: dict[str, int]  # of those who sell, in the registry
    clock: Clock
    opening: dict[str, int]  # what each purse held at the beginning
    held_before: int  # what lay in escrow then

    def account(self, role: str) -> Account:
        return self.keys[role].account

    def role_of(self, account: Account) -> str:
        return next((role for role, key in self.keys.items() if key.account == account), "a stranger")

    def buyer(self, role: str) -> Buyer:
        """The paying side of an agent."""
        return Buyer(self.keys[role], self.jobs, self.books, self.desks[role], self.street, clock=self.clock)

    def amount(self, units: int) -> Amount:
        return Amount(units, self.jobs.asset)


@asynccontextmanager
async def open_company(config: StudioConfig, clock: Clock) -> AsyncIterator[Company]:
    """Open it, making what is missing."""
    home = Home(config.state_dir)
    async with AsyncExitStack() as stack:
        stack.enter_context(home.locked())
        operator = home.account_key
        ledger = await stack.enter_async_context(open_ledger(home.path / "chain.journal", None, clock, operator))
        coin = await ensure_coin(ledger, operator, home.path / "coins.json")
        escrow, identity, reputation = await _ensure_contracts(ledger, operator, coin, home)
        jobs = await Jobs.open(ledger.chain, escrow)
        keys = {role: home.account(f"studio-{role.replace(' ', '-')}") for role in ROLES}
        for role, units in PURSES.items():
            await give_coins(ledger, coin, operator, keys[role].account, units)
        books = await to_thread.run_sync(lambda: IntentLedger(home.path / "agents.sqlite", clock=clock))
        stack.callback(books.close)
        desks, street = {}, Street()
        for role, key in keys.items():
            desks[role] = Desk(key.account, home.path / f"desk-{role.replace(' ', '-')}.sqlite", clock=clock)
            stack.callback(desks[role].close)
            street.move_in(desks[role])
        index = Indexer(None, ledger.chain, [JOB_ESCROW.at(escrow)], clock=clock)
        stack.callback(index.close)
        opening = {role: (await jobs.balance(key.account)).units for role, key in keys.items()}
        mandates = _mandates(home, books, keys, jobs, clock)
        registry = Registry(
            jobs, IdentityRegistry(ledger.chain, identity), ReputationRegistry(ledger.chain, reputation)
        )
        stack.callback(registry.close)
        numbers = {role: await registry.register(keys[role], _card(role, keys[role])) for role in SELLERS}
        held = (await jobs.balance(escrow)).units
        yield Company(
            home, ledger, jobs, books, keys, desks, street, mandates, index, JobView(index.queries), registry, numbers,
            clock, opening, held,
        )  # fmt: skip


async def _ensure_contracts(
    ledger: Ledger, operator: AccountKey, coin: Account, home: Home
) -> tuple[Account, Account, Account]:
    """Escrow, identities, reputation: those that are there, or new ones."""
    file = home.path / "studio.json"
    if file.exists():
        try:
            known = json.loads(file.read_bytes())
            return tuple(parse_account(known[name]) for name in CONTRACTS)  # type: ignore[return-value]
        except (ValueError, KeyError, TypeError) as error:
            raise Invalid(f"{file} is damaged: restore it, or remove the directory to begin anew") from error
    escrow = (await JobEscrow.deploy(ledger.chain, operator, coin, GRACE_S)).address
    identity = (await IdentityRegistry.deploy(ledger.chain, operator)).address
    reputation = (await ReputationRegistry.deploy(ledger.chain, operator, identity, escrow)).address
    made = (escrow, identity, reputation)
    write_atomic(file, json.dumps(dict(zip(CONTRACTS, made, strict=True))).encode())
    return made


def _card(role: str, key: AccountKey) -> Card:
    services = {kind: PRICES[kind] for kind, roles in MAKERS.items() if role in roles}
    return Card(role.capitalize(), key.account, services, "of the studio")


def _mandates(
    home: Home, books: IntentLedger, keys: dict[str, AccountKey], jobs: Jobs, clock: Clock
) -> dict[str, Mandate]:
    """Those in force, or new ones: each is signed by whoever's money or power it hands down."""
    patron, owner = home.account("studio-patron"), home.account("studio-owner")
    buyer = _mandate(books, clock, jobs, patron, keys["buyer"], 15 * 10**6, 200 * 10**6)
    editor = _mandate(books, clock, jobs, owner, keys["editor"], 4 * 10**6, 100 * 10**6)
    made = {"buyer": buyer, "editor": editor}
    for role in ("narrator", "second narrator"):
        made[role] = _mandate(
            books, clock, jobs, keys["editor"], keys[role], PRICES["check"], 30 * PRICES["check"], parent=editor
        )
    return made


def _mandate(
    books: IntentLedger, clock: Clock, jobs: Jobs, signer: AccountKey, agent: AccountKey, once: int, period: int,
    parent: Mandate | None = None,
) -> Mandate:  # fmt: skip
    """For jobs in this escrow and nothing else."""
    above = "" if parent is None else parent.id
    for known in books.mandates():
        alive = known.expires_at > clock.time() + 3_600 and not books.is_stopped(known.id)
        if known.agent == agent.account and known.parent == above and known.payees == (jobs.address,) and alive:
            return known
    mandate = Mandate(
        payer=signer.account if parent is None else parent.payer, agent=agent.account,
        per_payment=Amount(once, jobs.asset), per_period=Amount(period, jobs.asset),
        approve_above=Amount(once, jobs.asset), payees=(jobs.address,), purposes=("recap",), parent=above,
        expires_at=int(clock.time()) + MANDATE_S if parent is None else parent.expires_at,
    )  # fmt: skip
    return books.open(sign_mandate(mandate, signer))
