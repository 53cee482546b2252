"""A question to a person, in words: what would happen, why it is asked, and where each value comes from."""

from __future__ import annotations

from typing import Any

from tessera.agents.approvals import Request

__all__ = ["facts_of", "why"]

_WHY = {
    "outside_plan": "your request does not seem to need this tool",
    "link_of_a_stranger": "the address comes from a stranger, and fetching it tells them so",
    "recipient_not_named": "you have not named this recipient",
    "link_inside": "the text holds a stranger's address or link",
    "payee_not_named": "you have not named this payee",
    "paid_already": "this payee was paid for this request already",
    "amount_unexplained": "neither you nor your own records say this amount",
    "share_of_balance": "this is a large part of all there is",
    "object_not_named": "you have not named what is changed",
    "unrelated_entry": "this has no visible relation to your request",
    "not_asked_to_destroy": "this cannot be undone, and you did not ask for it",
    "control_not_said": "you did not say this password, permission or personal fact",
    "control_target": "this gives power to somebody you have not named",
    "not_simulated": "the transaction could not be tried beforehand",
    "denied": "you said no",
    "nobody": "nobody could be asked",
    "stopped": "the agent is stopped",
    "too_many_questions": "you were asked too often already",
    "look_alike": "the address is made to be mistaken for one you know",
    "simulation_differs": "the transaction would take more than the call says",
    "mandate": "the mandate does not allow it",
    "approve_above": "payments of this size need your signature",
}
_ORIGINS = {
    "user": "you said it", "record": "your own record of that name", "kind": "one of those you spoke of",
    "single": "the one address on the page you named", "own": "your own records", "known": "a member wrote it",
    "named": "a document you named", "outside": "a stranger, or the model itself", "payee": "who is paid",
}  # fmt: skip
SHOWN = 600  # characters of one value


def why(rule: str) -> str:
    """A rule in words; a rule of the operator's own by its name."""
    return _WHY.get(rule, rule.replace("_", " "))


def facts_of(request: Request) -> list[tuple[str, str]]:
    """What a person should see before they answer, in order."""
    call, evidence = request.call, request.evidence
    facts = [("tool", call.tool), *((name, _short(value)) for name, value in sorted(call.arguments.items()))]
    facts += [("why", why(rule)) for rule in evidence.get("rules", [])]
    if doubt := evidence.get("in_doubt"):
        facts.append(("careful", doubt))
    facts += [("comes from", f"{value}: {_ORIGINS.get(trust, trust)}") for value, trust in _trusts(evidence)]
    simulation = evidence.get("simulation") or {}
    facts += [("would leave", text) for text in simulation.get("leaves", [])]
    facts += [("tried, but", text) for text in simulation.get("findings", [])]
    facts += [("you asked", _short(evidence.get("request", ""))), ("run", evidence.get("run", ""))]
    if set(call.mandate) != {"0"}:
        facts.append(("mandate", call.mandate))
    return [(name, text) for name, text in facts if text]


def _trusts(evidence: Any) -> list[tuple[str, str]]:
    return [pair for name in ("to", "inside", "objects") for pair in sorted(dict(evidence.get(name, {})).items())]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"
