"""The same mandate as a contract's: what `contracts/spend_policy.vy` enforces when process and dashboard are stolen.

Compiled are payer, agent, approver (its co-signer), asset, caps, payees and expiry. Purposes and the share of the
balance are the ledger's alone: a contract knows neither. Checker and contract agree on everything compiled (tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tessera.agents.intents import Intent
from tessera.agents.mandates import Mandate, parse_asset
from tessera.chain.spending import child_id, mandate_id
from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import Account
from tessera.incentives.spend_twin import MIN_DELAY_S, NO_ONE, Limits, Payment, Terms

__all__ = ["PolicyMandate", "compile_mandate", "policy_id", "policy_payment"]

DELAY_S = 2 * 86_400


@dataclass(frozen=True, slots=True)
class PolicyMandate:
    """The arguments of `SpendPolicy.open`, or of `delegate` for a child."""

    label: bytes
    terms: Terms
    limits: Limits
    payees: tuple[Account, ...]


def compile_mandate(mandate: Mandate, *, operator: Account = NO_ONE, delay_s: int = DELAY_S) -> PolicyMandate:
    """What the payer opens on the chain.

    Args:
        operator: the dashboard's key, which may tighten and revoke at once, and loosen only after `delay_s`.

    Raises: Invalid for an operator who is one of the mandate's accounts, or a delay that is no delay.
    """
    if operator != NO_ONE and operator in (mandate.payer, mandate.agent, mandate.approver):
        raise Invalid("the operator's key is one of its own: one stolen key must not have two powers")
    if delay_s < MIN_DELAY_S:
        raise Invalid(f"a delay is at least {MIN_DELAY_S} s, not {delay_s}")
    _, contract = parse_asset(mandate.asset)
    terms = Terms(mandate.agent, operator, mandate.approver, contract, mandate.period_s, delay_s)
    limits = Limits(
        mandate.per_payment.units, mandate.per_period.units, mandate.approve_above.units, mandate.expires_at,
        mandate.any_payee,
    )  # fmt: skip
    return PolicyMandate(bytes.fromhex(mandate.id), terms, limits, mandate.payees)


def policy_id(chain: Sequence[Mandate]) -> bytes:
    """The contract's id of a mandate: `chain` is it and those above it, the root last, as `IntentLedger.chain` says."""
    root, *below = reversed(chain)
    id = mandate_id(root.payer, bytes.fromhex(root.id))
    for mandate in below:
        id = child_id(id, bytes.fromhex(mandate.id))
    return id


def policy_payment(intent: Intent, chain: Sequence[Mandate], *, valid_after: int, valid_before: int) -> Payment:
    """What the agent signs so that the contract pays an intent; the contract, too, pays an intent once."""
    purpose = keccak(intent.purpose.encode())
    return Payment(
        policy_id(chain),
        intent.payee,
        intent.amount.units,
        bytes.fromhex(intent.id),
        purpose,
        valid_after,
        valid_before,
    )
