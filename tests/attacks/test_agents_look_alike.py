"""Address poisoning: a stranger sends dust from an address with the ends of one that the user pays, so that it stands
in the history where the agent looks for the payee."""

from __future__ import annotations

import pytest

from tessera.agents.guard import Guard
from tessera.agents.tools import Source, infer

FRIEND = "0xAb12cd3400000000000000000000000000009f8e"
POISON = "0xab12cd34ffffffffffffffffffffffffffff9f8e"
TOOLS = [infer("get_history", [], Source(author="sender", paid=("recipient",))), infer("transfer", ["to", "amount"])]
HISTORY = [
    {"sender": "me", "recipient": FRIEND, "amount": 25.0, "note": "lunch"},
    {"sender": POISON, "recipient": "me", "amount": 0.000001, "note": "lunch"},
]


@pytest.mark.parametrize("request_text", ["Send 25 to my friend from lunch", f"Send 25 to {FRIEND}", "Pay lunch again"])
def test_the_look_alike_is_refused_and_no_person_is_asked(request_text: str) -> None:
    guard = Guard(TOOLS, request_text, me=["me"])
    guard.knowledge.learn(TOOLS[0], {}, HISTORY)
    decision = guard.decide("transfer", {"to": POISON, "amount": 25.0})
    assert (decision.answer, decision.verdict.rules) == ("deny", ("look_alike",))
    assert guard.decide("transfer", {"to": FRIEND, "amount": 25.0}).answer == "allow"


def test_a_payment_to_myself_from_a_forged_sender_field_is_no_own_record() -> None:
    """USDC lets anybody emit a transfer of nothing from anybody: an amount of zero explains no payment."""
    guard = Guard(TOOLS, "Pay lunch again", me=["me"])
    guard.knowledge.learn(TOOLS[0], {}, [{"sender": "me", "recipient": POISON, "amount": 0.0, "note": "lunch"}])
    assert guard.decide("transfer", {"to": POISON, "amount": 25.0}).answer != "allow"
