"""Why a contract said no: the revert's bytes, decoded and mapped to the error that tells the caller what to do.

Our contracts revert with `"module: reason"`. `REASONS` is the one table from those to classes; a reason that is not in
it (a foreign contract's) becomes `Refused`. A test compares the table with the sources. `ERRORS` are the custom errors
of Permit2 and of x402's proxies, which our own stand-ins for them raise too: clients read them by name.
"""

from __future__ import annotations

from typing import Any

from eth_abi.abi import decode as abi_decode
from eth_abi.exceptions import DecodingError

from tessera.core.errors import Conflict, Invalid, Late, Missing, PaymentRequired, Refused, TesseraError
from tessera.core.hashing import keccak

__all__ = ["ERRORS", "REASONS", "revert_error", "revert_reason"]

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
    "identity_registry: bad operator": Invalid,
    "identity_registry: bad receiver": Invalid,
    "identity_registry: bad wallet": Invalid,
    "identity_registry: deadline too far": Invalid,
    "identity_registry: no such agent": Missing,
    "identity_registry: nobody's balance": Invalid,
    "identity_registry: not authorized": Refused,
    "identity_registry: not the owner": Refused,
    "identity_registry: not the wallet's signature": Invalid,
    "identity_registry: receiver refused": Refused,
    "identity_registry: reserved key": Invalid,
    "identity_registry: signature expired": Late,
    "income_split: a run in another asset": Invalid,
    "income_split: a tally is waiting": Conflict,
    "income_split: already paid": Conflict,
    "income_split: asset is no contract": Invalid,
    "income_split: bad part": Invalid,
    "income_split: bad proof": Invalid,
    "income_split: bad worker": Invalid,
    "income_split: challenge window is open": Refused,
    "income_split: challenge window is over": Refused,
    "income_split: has begun": Conflict,
    "income_split: has not begun": Refused,
    "income_split: more than the workers' part": Refused,
    "income_split: not a worker's signature": Invalid,
    "income_split: not the creator": Refused,
    "income_split: not the next tally": Conflict,
    "income_split: not the waiting tally": Conflict,
    "income_split: signers not ascending": Invalid,
    "income_split: tally exhausted": Refused,
    "income_split: the run has not begun": Refused,
    "income_split: too few signatures": Refused,
    "income_split: too much income": Refused,
    "income_split: transfer failed": Refused,
    "job_escrow: another budget": Conflict,
    "job_escrow: asset is no contract": Invalid,
    "job_escrow: bad deadline": Invalid,
    "job_escrow: bad evaluator": Invalid,
    "job_escrow: bad part": Invalid,
    "job_escrow: bad provider": Invalid,
    "job_escrow: bond too large": Invalid,
    "job_escrow: budget too large": Invalid,
    "job_escrow: closed already": Conflict,
    "job_escrow: grace too long": Invalid,
    "job_escrow: hook is no contract": Invalid,
    "job_escrow: hook refused": Refused,
    "job_escrow: neither client nor provider": Refused,
    "job_escrow: no bond here": Refused,
    "job_escrow: no bond to post": Conflict,
    "job_escrow: no budget": Refused,
    "job_escrow: no provider": Refused,
    "job_escrow: no such job": Missing,
    "job_escrow: not expired": Refused,
    "job_escrow: not funded": Conflict,
    "job_escrow: not open": Conflict,
    "job_escrow: not submitted": Conflict,
    "job_escrow: not the client": Refused,
    "job_escrow: not the evaluator": Refused,
    "job_escrow: not the provider": Refused,
    "job_escrow: nothing arrived": Refused,
    "job_escrow: nothing owed": Refused,
    "job_escrow: nothing to refund": Conflict,
    "job_escrow: provider is set": Conflict,
    "job_escrow: too late": Late,
    "job_escrow: too little gas for the hook": Refused,
    "job_escrow: transfer failed": Refused,
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
    "permit2: transfer failed": Refused,
    "reputation_registry: clients required": Invalid,
    "reputation_registry: empty response": Invalid,
    "reputation_registry: escrow is no contract": Invalid,
    "reputation_registry: identity is no contract": Invalid,
    "reputation_registry: job has voted": Conflict,
    "reputation_registry: job not completed": Refused,
    "reputation_registry: no job in endpoint": Invalid,
    "reputation_registry: no such feedback": Missing,
    "reputation_registry: not the agent's job": Refused,
    "reputation_registry: not the job's client": Refused,
    "reputation_registry: revoked already": Conflict,
    "reputation_registry: self-feedback": Refused,
    "reputation_registry: too many decimals": Invalid,
    "reputation_registry: too many, name fewer clients": Refused,
    "reputation_registry: value too large": Invalid,
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
    "spend_policy: a child cannot be loosened": Refused,
    "spend_policy: above the cap per payment": Refused,
    "spend_policy: above the cap per period": Refused,
    "spend_policy: asset is no contract": Invalid,
    "spend_policy: bad agent": Invalid,
    "spend_policy: bad delay": Invalid,
    "spend_policy: bad payee": Invalid,
    "spend_policy: bad period": Invalid,
    "spend_policy: cap too large": Invalid,
    "spend_policy: intent is already paid": Conflict,
    "spend_policy: label is taken": Conflict,
    "spend_policy: looser limits must be proposed": Refused,
    "spend_policy: mandate is expired": Refused,
    "spend_policy: mandate is revoked": Refused,
    "spend_policy: may not stop this": Refused,
    "spend_policy: needs the co-signer": Refused,
    "spend_policy: no such mandate": Missing,
    "spend_policy: no such proposal": Missing,
    "spend_policy: not owner or operator": Refused,
    "spend_policy: not the agent": Refused,
    "spend_policy: not the agent's signature": Invalid,
    "spend_policy: nothing to pay": Invalid,
    "spend_policy: payee is not listed": Refused,
    "spend_policy: payment is expired": Invalid,
    "spend_policy: payment is not yet valid": Refused,
    "spend_policy: proposal has lapsed": Refused,
    "spend_policy: proposal is not yet due": Refused,
    "spend_policy: too many levels": Refused,
    "spend_policy: transfer failed": Refused,
    "validation_registry: asked already": Conflict,
    "validation_registry: bad validator": Invalid,
    "validation_registry: identity is no contract": Invalid,
    "validation_registry: more than 100": Invalid,
    "validation_registry: no such request": Missing,
    "validation_registry: not authorized": Refused,
    "validation_registry: not the validator": Refused,
}

ERRORS: dict[str, type[TesseraError]] = {
    "AmountExceedsPermitted()": Invalid,
    "InvalidAmount()": Invalid,
    "InvalidAmount(uint256)": Invalid,
    "InvalidContractSignature()": Invalid,
    "InvalidDestination()": Invalid,
    "InvalidNonce()": Conflict,
    "InvalidOwner()": Invalid,
    "InvalidSignature()": Invalid,
    "InvalidSignatureLength()": Invalid,
    "InvalidSigner()": Invalid,
    "PaymentTooEarly()": Refused,
    "SignatureExpired(uint256)": Invalid,
    "UnauthorizedFacilitator()": Refused,
}
_SELECTORS = {keccak(signature.encode())[:4]: signature for signature in ERRORS}
_PANICS = {
    0x01: "an assertion failed", 0x11: "arithmetic overflow", 0x12: "division by zero", 0x21: "not a value of the enum",
    0x22: "storage is damaged", 0x31: "pop from an empty array", 0x32: "index out of bounds", 0x41: "too much memory",
    0x51: "call of a zero function",
}  # fmt: skip


def revert_reason(data: bytes) -> str:
    """The text in a revert's bytes. Never raises: a contract may put anything there."""
    if not data:
        return "no reason given"
    if data[:4] == ERROR_STRING and len(data) >= 68:
        length = int.from_bytes(data[36:68], "big")
        if length <= len(data) - 68:
            return data[68 : 68 + length].decode(errors="replace")[:REASON_LIMIT]
    if data[:4] == PANIC and len(data) == 36:
        code = int.from_bytes(data[4:], "big")
        return f"panic 0x{code:02x}" + (f": {_PANICS[code]}" if code in _PANICS else "")
    if data[:4] in _SELECTORS:
        return _custom_error(_SELECTORS[data[:4]], data[4:])
    return f"0x{data.hex()}"[:REASON_LIMIT]


def revert_error(reason: str, **fields: Any) -> TesseraError:
    """The error for a reason; `fields` go along (`tx_hash`, for one)."""
    cls = REASONS.get(reason) or _BY_TEXT.get(reason.partition("(")[0], Refused)
    fields = {"reason": reason, **fields}
    if cls is Refused:
        return Refused(f"the contract refused: {reason}", rule=reason, **fields)
    return cls(f"the contract refused: {reason}", **fields)


_BY_TEXT = {signature.partition("(")[0]: cls for signature, cls in ERRORS.items()}


def _custom_error(signature: str, arguments: bytes) -> str:
    """`InvalidAmount(40000)`. Arguments that are none of it are shown as bytes."""
    name, _, kinds = signature.rstrip(")").partition("(")
    try:
        values = abi_decode([kind for kind in kinds.split(",") if kind], arguments)
    except DecodingError:
        return f"{name}(0x{arguments.hex()})"[:REASON_LIMIT]
    return f"{name}({', '.join(str(value) for value in values)})"
