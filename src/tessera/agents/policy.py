"""Allow, ask or deny: Cedar policies over what the guard knows about a call.

The engine is Cedar (cedarpy); its text stands in `policies/default.cedar`, and an operator may add files of their own,
which can only forbid more. Two questions make three answers: may it be done at once; and if not, may a person allow it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from tessera.core.errors import Invalid

__all__ = ["Policy", "Verdict"]

Answer = Literal["allow", "ask", "deny"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`rules` are the ids of the policies that stood in the way of doing it at once."""

    answer: Answer
    rules: tuple[str, ...] = ()


class Policy:
    """A set of Cedar policies.

    Args:
        extra: more Cedar text. A permit in it is refused: additions can only forbid.
    """

    def __init__(self, extra: str = "") -> None:
        try:
            from cedarpy import PolicySet, policies_to_json_str
        except ImportError as error:
            raise Invalid("the policy engine is missing: pip install 'tessera-network[agents]'") from error
        if extra:
            _check_forbids_only(extra, policies_to_json_str)
        text = files("tessera.agents").joinpath("policies/default.cedar").read_text(encoding="utf-8")
        self._set = PolicySet.from_str(text + "\n" + extra)
        self.seconds = 0.0  # of the processor, spent in the engine

    def judge(self, effect: str, tool: str, context: Mapping[str, Any]) -> Verdict:
        """`context` without `approved`. Raises: Invalid when a policy of the operator's asks for what is not there."""
        allowed, rules = self._ask(effect, tool, {**context, "approved": False})
        if allowed:
            return Verdict("allow")
        approvable, hard = self._ask(effect, tool, {**context, "approved": True})
        return Verdict("ask", rules) if approvable else Verdict("deny", hard)

    def _ask(self, effect: str, tool: str, context: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
        from cedarpy import is_authorized

        request = {
            "principal": {"type": "Agent", "id": "agent"}, "action": {"type": "Action", "id": effect},
            "resource": {"type": "Tool", "id": tool}, "context": context,
        }  # fmt: skip
        started = time.thread_time()
        result = is_authorized(request, self._set, "[]")
        self.seconds += time.thread_time() - started
        if result.diagnostics.errors:  # a policy that cannot be evaluated would be skipped: nothing passes then
            raise Invalid(f"a policy cannot be evaluated: {result.diagnostics.errors[0]}")
        names = result.diagnostics.id_annotations_by_reason
        return result.allowed, tuple(sorted(names.get(reason, reason) for reason in result.diagnostics.reasons))


def _check_forbids_only(text: str, to_json: Any) -> None:
    import json

    try:
        parsed = json.loads(to_json(text))
    except ValueError as error:
        raise Invalid(f"the policies cannot be read: {error}") from error
    if any(policy["effect"] != "forbid" for policy in parsed.get("staticPolicies", {}).values()):
        raise Invalid("an added policy may only forbid")
    if parsed.get("templates"):
        raise Invalid("templates are not used here")
