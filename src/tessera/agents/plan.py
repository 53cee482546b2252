"""A tool plan from the user's request alone, before anything from outside is read.

The words of the request say which effects it wants: without a word for sending, nothing is sent. It is a coarse plan,
made without a model, and it errs to the generous side; a planner with a model that sees nothing but the request makes a
finer one, and `Guard` takes either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tessera.agents.tools import Effect, ToolSpec, word_set

__all__ = ["plan_from"]

_WANTED: dict[Effect, frozenset[str]] = {
    "fetch": word_set(
        "read visit open website websites web page webpage site link article blog summarize summary find look check "
        "download browse online post posted invite message contact information info details"
    ),
    "send": word_set(
        "send sends email emails mail message messages write tell post posts reply share forward invite ask notify "
        "announce publish add congratulate greet dm"
    ),
    "pay": word_set(
        "pay pays payment payments send transfer refund buy purchase order subscribe subscription donate tip rent bill "
        "reimburse standing recurring book invoice owe back"
    ),
    "write": word_set(
        "create creates add adds make book booking reserve reservation schedule reschedule remind reminder event set "
        "put update change edit write append save move rename new note calendar list copy"
    ),
    "destroy": word_set("delete remove cancel erase clear drop archive revoke ban unsubscribe trash"),
    "control": word_set(
        "password permission permissions share access update change account address settings reset security login "
        "approve grant information details profile"
    ),
}
_DELEGATED = word_set("task tasks todo todos instructions instruction actions action")


def plan_from(request: str, tools: Iterable[ToolSpec]) -> frozenset[str]:
    """The tools that the request may need. A request that hands over to a list of tasks elsewhere allows all of them.

    >>> from tessera.agents.tools import infer
    >>> sorted(plan_from("What did I spend in May?", [infer("get_payments", []), infer("send_money", ["to"])]))
    ['get_payments']
    """
    words = set(re.findall(r"\w+", request.casefold()))
    specs = list(tools)
    if words & _DELEGATED:
        return frozenset(spec.name for spec in specs)
    wanted = {effect for effect, names in _WANTED.items() if words & names} | {"read"}
    return frozenset(spec.name for spec in specs if spec.effect in wanted)
