"""Where an agent lives: a folder with its definition, its keys, its mandate and its ledgers.

NAME/agent.toml    what it is                      NAME/mandate.json   what it may pay, signed by the payer
NAME/keys/         agent, approver and payer       NAME/agents.sqlite  runs, purchases, questions, notes
"""

from __future__ import annotations

from pathlib import Path

from tessera.agents.approvals import Approvals
from tessera.agents.ledger import IntentLedger
from tessera.agents.mandates import MANDATE_LIMIT, Mandate, SignedMandate
from tessera.agents.runtime.definition import Definition, WalletPart, read_definition
from tessera.agents.steps import NAME, StepLedger
from tessera.core.errors import Invalid, Missing
from tessera.core.ids import Account, parse_account

__all__ = ["DEFINITION", "AgentHome", "homes"]

DEFINITION = "agent.toml"


class AgentHome:
    """Raises: Missing when no agent lives there; Invalid for a definition that cannot be used."""

    def __init__(self, folder: Path) -> None:
        if NAME.fullmatch(folder.name) is None:
            raise Invalid(f"an agent is called a-z, 0-9, - and _, at most 64 of them, not {folder.name[:80]!r}")
        self.folder, self.name = folder, folder.name
        self.definition: Definition = read_definition(folder / DEFINITION)
        if self.definition.name != self.name:
            raise Invalid(f"{folder / DEFINITION} is called {self.definition.name!r}, and its folder {self.name!r}")
        where = self.definition.database
        self.database: str | Path = where if "://" in where else folder / where

    @property
    def approver(self) -> Account:
        """Whose signature counts. Raises: Invalid when nobody is named."""
        return parse_account(self.definition.approver)

    def steps(self) -> StepLedger:
        return StepLedger(self.database)

    def ledger(self) -> IntentLedger:
        """With the mandate in force, when there is one."""
        ledger = IntentLedger(self.database)
        if self.definition.wallet is not None:
            ledger.open(self.signed(self.definition.wallet))
        return ledger

    def approvals(self) -> Approvals:
        return Approvals(self.approver, self.database)

    def mandate(self) -> Mandate | None:
        return None if self.definition.wallet is None else self.signed(self.definition.wallet).mandate

    def signed(self, part: WalletPart) -> SignedMandate:
        """The mandate of the payer. Raises: Missing; Invalid."""
        file = self.folder / part.mandate
        try:
            with file.open("rb") as opened:
                return SignedMandate.decode(opened.read(MANDATE_LIMIT + 1))
        except OSError as error:
            raise Missing(f"the mandate {file} cannot be read: {error.strerror}") from error


def homes(folder: Path) -> list[AgentHome]:
    """All agents below a folder, by name."""
    return [AgentHome(file.parent) for file in sorted(folder.glob(f"*/{DEFINITION}"))]
