"""Why a contract said no: the revert's bytes, decoded and mapped to the error that tells the caller what to do.

Our contracts revert with `"module: reason"`. `REASONS` is the one table from those to classes; a reason that is not in
it (a foreign contract's) becomes `Refused`. A test compares the table with the sources.
"""

from __future__ import annotations

from typing import Any

from tessera.core.errors import Conflict, Invalid, PaymentRequired, Refused, TesseraError

__all__ = ["REASONS", "revert_error", "revert_reason"]

ERROR_STRING = bytes.fromhex("08c379a0")  # Error(string)
PANIC = bytes.fromhex("4e487b71")  # Panic(uint256)
REASON_LIMIT = 500  # characters kept of a contract's text

REASONS: dict[str, type[TesseraError]] = {
    "coin: authorization is expired": Invalid,
    "coin: authorization is not yet valid": Refused,
    "coin: authorization is used or canceled": Conflict,
    "coin: bad receiver": Invalid,
    "coin: caller must be the payee": Refused,
    "coin: invalid signature": Invalid,
    "coin: supply exceeds 2**256": Invalid,
    "coin: transfer amount exceeds allowance": Refused,
    "coin: transfer amount exceeds balance": PaymentRequired,
    "coin: unknown method": Invalid,
    "model_share: allowance too small": Refused,
    "model_share: already redeemed": Conflict,
    "model_share: asset is no contract": Invalid,
    "model_share: bad holder": Invalid,
    "model_share: bad proof": Invalid,
    "model_share: bad receiver": Invalid,
    "model_share: balance too small": Refused,
    "model_share: epoch exhausted": Refused,
    "model_share: issuer is no contract": Invalid,
    "model_share: not the issuer": Refused,
    "model_share: not the next epoch": Conflict,
    "model_share: too many shares": Invalid,
    "model_share: too much income": Refused,
    "model_share: transfer failed": Refused,
    "run: a proposal is waiting": Conflict,
    "run: a share of another run": Invalid,
    "run: a share that earns in another asset": Invalid,
    "run: a stage without a worker": Invalid,
    "run: account had a seat": Conflict,
    "run: another contract issues that share": Invalid,
    "run: asset is no contract": Invalid,
    "run: bad challenger": Invalid,
    "run: bad early weight": Invalid,
    "run: bad schedule": Invalid,
    "run: bad stages": Invalid,
    "run: bond is still at risk": Refused,
    "run: bonds must outlast the challenge window": Invalid,
    "run: candidate may still be taken in": Refused,
    "run: challenge window is open": Refused,
    "run: challenge window is over": Refused,
    "run: delay above a year": Invalid,
    "run: empty change": Invalid,
    "run: every stage is full": Refused,
    "run: has begun": Conflict,
    "run: has not announced to leave": Refused,
    "run: has not begun": Refused,
    "run: last worker": Refused,
    "run: no bond to take": Refused,
    "run: no candidate with a stage": Invalid,
    "run: no candidate without a stage": Invalid,
    "run: no candidate": Invalid,
    "run: not a worker": Invalid,
    "run: not a worker's signature": Invalid,
    "run: not his receipt": Invalid,
    "run: not the creator": Refused,
    "run: not the next change": Conflict,
    "run: not the next epoch": Conflict,
    "run: not the waiting proposal": Conflict,
    "run: nothing to withdraw": Refused,
    "run: only by invitation": Refused,
    "run: open to all without a stake": Invalid,
    "run: peer had a seat": Conflict,
    "run: receipts agree": Invalid,
    "run: reward above half": Invalid,
    "run: signers not ascending": Invalid,
    "run: stake did not arrive": Invalid,
    "run: too early to draw": Refused,
    "run: too early to leave alone": Refused,
    "run: too few signatures": Refused,
    "run: too many shares": Invalid,
    "run: too many workers": Refused,
    "run: transfer failed": Refused,
}


def revert_reason(data: bytes) -> str:
    """The text in a revert's bytes. Never raises: a contract may put anything there."""
    if not data:
        return "no reason given"
    if data[:4] == ERROR_STRING and len(data) >= 68:
        length = int.from_bytes(data[36:68], "big")
        if length <= len(data) - 68:
            return data[68 : 68 + length].decode(errors="replace")[:REASON_LIMIT]
    if data[:4] == PANIC and len(data) == 36:
        return f"panic 0x{int.from_bytes(data[4:], 'big'):02x}"
    return f"0x{data.hex()}"[:REASON_LIMIT]


def revert_error(reason: str, **fields: Any) -> TesseraError:
    """The error for a reason; `fields` go along (`tx_hash`, for one)."""
    cls = REASONS.get(reason, Refused)
    fields = {"reason": reason, **fields}
    if cls is Refused:
        return Refused(f"the contract refused: {reason}", rule=reason, **fields)
    return cls(f"the contract refused: {reason}", **fields)
