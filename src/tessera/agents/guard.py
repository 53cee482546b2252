"""The guard: one choke point around every tool. It assumes that the model obeys the attacker.

    guard = Guard([infer("send_email", ["recipients", "body"])], request="Write to Ann that I am late")
    result = guard.call("send_email", {"recipients": [...], "body": ...}, executor)

`executor(tool, arguments)` is any function that runs a tool, of any framework; `acall` takes an asynchronous one. Every
call is judged by who could have written its arguments, never by what the model says about them.

Invariants: nothing runs that was not allowed or approved; an approval is for these very arguments and used once; what a
tool returns, a message or an asset that came in, grants nothing; a stop holds from the next call on; arguments without
a canonical form are refused; a tool whose name says nothing counts as one that gives power away.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tessera.agents.origins import Knowledge, Origin, addresses_in, days_in, looks_like, norm, nouns_of, strings_in
from tessera.agents.policy import Policy, Verdict
from tessera.agents.tools import ToolSpec, infer, is_id, word_set
from tessera.core import encoding
from tessera.core.errors import Invalid, Refused
from tessera.core.hashing import sha256

__all__ = ["Approver", "Ask", "Decision", "Guard", "GuardConfig", "NeedsApproval", "Simulated"]

Executor = Callable[[str, dict[str, Any]], Any]
AsyncExecutor = Callable[[str, dict[str, Any]], Awaitable[Any]]
_TRUST = ("outside", "named", "known", "own", "single", "kind", "record", "user", "none")  # ascending
_STRANGE = ("outside", "named", "known")
_OBJECT_TRUST = ("unknown", "mentioned", "picked", "made", "record", "user", "none")
_DESTROY = word_set(
    "delete deletes remove removes cancel cancels erase clear drop archive revoke ban kick unsubscribe close trash "
    "discard rid"
)
_PERMISSIONS = {
    "r": ("read", "view"), "read": ("read", "view"), "reader": ("read", "view"), "viewer": ("read", "view"),
    "rw": ("write", "edit"), "write": ("write", "edit"), "editor": ("write", "edit"),
}  # fmt: skip
_REFUND = word_set("refund refunds reimburse repay return back")


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """How far the guard goes without asking."""

    raise_bps: int = 2_500  # how much more than before an own payee may get without the user's word, in 1/10,000
    share_bps: int = 5_000  # of the balance, from which on a payment is asked for, in 1/10,000
    max_questions: int = 8  # of one run; afterwards what needs a question is denied: nobody is worn down


@dataclass(frozen=True, slots=True)
class Decision:
    """What the guard says about one call, and the evidence for it."""

    verdict: Verdict
    tool: str
    arguments: Mapping[str, Any]
    digest: str  # of tool, arguments and nonce: what an approval is for
    nonce: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        return self.verdict.answer


class NeedsApproval(Refused):
    """A person has to allow this call; `decision` says which and why."""

    def __init__(self, decision: Decision) -> None:
        rules = ", ".join(decision.verdict.rules)
        super().__init__(f"{decision.tool} needs a person's approval: {rules}", rule="approval", rules=rules)
        self.decision = decision


class Simulated(Protocol):
    """What a transaction did when it was run on a copy of the chain; see `agents.simulation`."""

    @property
    def verdict(self) -> str:
        """ "same" as what the call says, "differs", or "unknown" when it could not be run."""
        ...

    def to_dict(self) -> dict[str, Any]: ...


class Approver(Protocol):
    """Who is asked. Returns whether the person allowed exactly this call, once.

    `tessera.agents.approvals.Approvals` keeps signed approvals for agents that wait for hours.
    """

    def __call__(self, decision: Decision) -> bool: ...


Ask = Approver


class Guard:
    """One run of an agent.

    Args:
        tools: what is known of each tool; others are inferred from their names and argument names.
        request: what the user wrote, and nothing else.
        me: the user's own names, addresses and accounts; more are learnt from tools whose source says `identity`.
        plan: the tools that the user's request needs, when somebody has said so before any outside text was read.
        approver: asked in place; None raises NeedsApproval, to be resumed with `resume`.
        stopped: the kill switch, asked before each call, such as `lambda: ledger.is_stopped(mandate)`.
        mandate: raises Refused when the mandate does not allow a payment; see `agents.mandates.check_payment`.
    """

    def __init__(
        self,
        tools: Iterable[ToolSpec],
        request: str,
        *,
        me: Iterable[str] = (),
        plan: Iterable[str] | None = None,
        policy: Policy | None = None,
        config: GuardConfig | None = None,
        approver: Approver | None = None,
        stopped: Callable[[], bool] = lambda: False,
        mandate: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.config = config or GuardConfig()
        self.knowledge = Knowledge(request, me={norm(name) for name in me})
        self.questions = 0
        self.log: list[Decision] = []
        self._tools = {spec.name: spec for spec in tools}
        self._plan = None if plan is None else frozenset(plan)
        self._policy = policy or Policy()
        self._approver, self._stopped, self._mandate = approver, stopped, mandate
        self._led_to: set[str] = set()
        self._paid_here: set[str] = set()
        self._open: dict[str, Decision] = {}  # asked and not resumed yet

    # --- calling ----------------------------------------------------------------------------------------------------

    def preload(self, executor: Executor) -> None:
        """Read the user's own records before the model runs, with the tools that say how."""
        for spec in self._tools.values():
            for arguments in spec.preload:
                if spec.effect != "read":
                    raise Invalid(f"{spec.name} does not only read: it cannot be preloaded")
                self.knowledge.learn(spec, arguments, _plain(executor(spec.name, dict(arguments))))
        for spec in list(self._tools.values()):
            argument, kind = spec.preload_each
            for value in self.knowledge.members(kind) if kind else ():
                self.knowledge.learn(spec, {argument: value}, _plain(executor(spec.name, {argument: value})))

    def call(self, tool: str, arguments: Mapping[str, Any], executor: Executor) -> Any:
        """Run a tool if it may be run. Raises: Refused with the policy as its rule; NeedsApproval."""
        decision = self.admit(tool, arguments)
        result = executor(tool, dict(decision.arguments))
        self.learn(decision, result)
        return result

    async def acall(self, tool: str, arguments: Mapping[str, Any], executor: AsyncExecutor) -> Any:
        """The same for an asynchronous executor."""
        decision = self.admit(tool, arguments)
        result = await executor(tool, dict(decision.arguments))
        self.learn(decision, result)
        return result

    def resume(self, digest: str, executor: Executor) -> Any:
        """Run the call that was asked for, after a person has allowed it. Once.

        Raises: Refused when nobody asked for it, it was resumed already, or it must not run any more.
        """
        decision = self._open.pop(digest, None)
        if decision is None:
            raise Refused("no call waits under this digest: it was resumed, or never asked for", rule="not_waiting")
        if self._stopped():
            raise Refused("the agent was stopped", rule="stopped")
        result = executor(decision.tool, dict(decision.arguments))
        self.endorse(decision)
        self.learn(decision, result)
        return result

    def call_approved(
        self, tool: str, arguments: Mapping[str, Any], executor: Executor, use: Callable[[], None]
    ) -> Any:
        """Run a call that was approved elsewhere, also by a process that has ended since.

        Args:
            use: takes the approval for these very arguments, or raises, such as
                `lambda: approvals.use(approval, call)`; called only when a person's word is enough for this call.

        Raises: Refused when it is not enough; what `use` raises.
        """
        decision = self.decide(tool, arguments)
        _refuse_denied(decision)
        use()
        self.endorse(decision)
        result = executor(tool, dict(decision.arguments))
        self.learn(decision, result)
        return result

    def wrap(self, executor: Executor) -> Executor:
        """`executor` behind the guard."""
        return lambda tool, arguments: self.call(tool, arguments, executor)

    def spec(self, tool: str, arguments: Mapping[str, Any]) -> ToolSpec:
        if tool not in self._tools:
            self._tools[tool] = infer(tool, arguments)
        return self._tools[tool]

    # --- judging ----------------------------------------------------------------------------------------------------

    def decide(self, tool: str, arguments: Mapping[str, Any], simulated: Simulated | None = None) -> Decision:
        """Judge a call without running it.

        Args:
            simulated: what the transaction that the call would sign does, for a tool that signs one.
        """
        spec = self.spec(tool, arguments)
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            text = encoding.encode([tool, given])
        except Invalid as error:
            raise Refused(f"the arguments have no canonical form: {error.message}", rule="arguments") from error
        frozen = encoding.decode(text, len(text))[1]  # what is judged is what runs: nobody else holds these objects
        context, evidence = self._context(spec, frozen)
        context["simulation"] = ("missing" if spec.signs else "none") if simulated is None else simulated.verdict
        if simulated is not None:
            evidence["simulation"] = simulated.to_dict()
        nonce = secrets.token_hex(32)
        digest = sha256(b"tessera/call\0", bytes.fromhex(nonce), text).hex()
        verdict = self._policy.judge(spec.effect, tool, context)
        decision = Decision(verdict, tool, frozen, digest, nonce, evidence)
        self.log.append(decision)
        return decision

    def admit(self, tool: str, arguments: Mapping[str, Any], simulated: Simulated | None = None) -> Decision:
        """Judge a call that is about to be made, and ask where somebody has to be asked. Tell `learn` what it returned.

        Raises: as `call`.
        """
        decision = self.decide(tool, arguments, simulated)
        _refuse_denied(decision)
        if decision.answer == "ask":
            self.questions += 1
            if self._approver is None:
                self._open[decision.digest] = decision
                raise NeedsApproval(decision)
            if not self._approver(decision):
                raise Refused(f"{tool} was denied by a person", rule="denied")
            if self._stopped():
                raise Refused("the agent was stopped", rule="stopped")
            self.endorse(decision)
        return decision

    def endorse(self, decision: Decision) -> None:
        """A person has allowed this call: what it names is the user's from now on."""
        spec = self.spec(decision.tool, decision.arguments)
        roles = ("target", "url", "label", "control")
        self.knowledge.endorse(
            text for name, value in decision.arguments.items() if spec.role(name) in roles for text in strings_in(value)
        )

    def learn(self, decision: Decision, result: Any) -> None:
        """What an admitted call returned: labels for whatever is made of it later."""
        spec = self.spec(decision.tool, decision.arguments)
        made = spec.effect in ("write", "send", "pay")
        self.knowledge.learn(spec, decision.arguments, _plain(result), made_here=made)
        trusted = {text for text, trust in decision.evidence["to"].items() if trust in ("single", "kind", "record")}
        if made:  # whom the user's words have led to once, they lead to again
            self._led_to.update(map(norm, trusted))
        if spec.effect == "pay":
            values = [v for n, v in decision.arguments.items() if spec.role(n) in ("target", "url", "object")]
            self._paid_here.update(norm(text) for value in values for text in strings_in(value))

    def _context(self, spec: ToolSpec, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        if spec.effect == "read":  # the policies ask nothing else of it
            arguments = {}
        by_role: dict[str, list[tuple[str, Any]]] = {}
        for name, value in arguments.items():
            by_role.setdefault(spec.role(name), []).append((name, value))
        targets = [
            text for role in ("target", "url") for _, value in by_role.get(role, ()) for text in strings_in(value)
        ]
        objects = [text for _, value in by_role.get("object", ()) for text in _ids_in(value)]
        texts = [
            text for role in ("content", "label", "object") for _, v in by_role.get(role, ()) for text in strings_in(v)
        ]
        amounts = [
            float(v) for _, v in by_role.get("amount", ()) if isinstance(v, (int, float)) and type(v) is not bool
        ]
        subject = str(arguments.get(spec.subject, "")) if spec.subject else ""
        to = {text: self._trust_of(spec, text, subject) for text in targets}
        if subject in to and "single" in to.values() and to[subject] == "known":
            to[subject] = "single"  # the member's word for the person whose one address this is
        inside = {found: self._trust_of(spec, found, "") for text in texts for found in addresses_in(text)}
        named_by = [nouns_of(name) or nouns_of(spec.name) for name, _ in by_role.get("object", ())]
        nouns = frozenset().union(*named_by, *(nouns_of(word) for word in ("file",) if "attachments" in arguments))
        things = {text: self._object_trust(text, nouns) for text in objects}
        pays = spec.effect == "pay"
        standing = max((self._standing(text, nouns) for text in objects), default=0.0)
        context = {
            "stopped": self._stopped(),
            "planned": self._plan is None or spec.name in self._plan,
            "questions_left": self.config.max_questions - self.questions,
            "to": min(to.values(), key=_TRUST.index, default="none"),
            "content": min(inside.values(), key=_TRUST.index, default="none"),
            "object": min(things.values(), key=_OBJECT_TRUST.index, default="none"),
            "leaves": spec.effect in ("send", "pay") or bool(targets),
            "look_alike": any(self._is_look_alike(text) for text in targets if to[text] in _STRANGE),
            "repeated": pays and not self._paid_here.isdisjoint(map(norm, targets or objects)),
            "amount_explained": not pays or self._explains(amounts, targets, standing),
            "large_share": pays and self._is_large(amounts, targets, standing),
            "mandate_refuses": pays and self._mandate_refuses(spec, arguments),
            "related": spec.effect != "write" or self._is_related(by_role),
            "day_spoken_of": spec.effect != "write" or self._is_spoken_day(by_role),
            "destruction_asked": self.knowledge.asks_for(_DESTROY),
            "control_said": all(
                self.knowledge.origin(text) == Origin.USER or self.knowledge.asks_for(_PERMISSIONS.get(text, ()))
                for _, value in by_role.get("control", ())
                for text in strings_in(value)
            ),
        }  # fmt: skip
        evidence = {"to": to, "inside": inside, "objects": things, "amounts": amounts}
        return context, evidence

    def _trust_of(self, spec: ToolSpec, value: str, subject: str) -> str:
        """One of `_TRUST` for a target or an address."""
        known = self.knowledge
        origin = known.origin(value)
        if origin == Origin.USER or norm(value) in known.me:
            return "user"
        if norm(value) in self._led_to and spec.effect != "pay":
            return "record"
        kind = known.kind_of(value)
        if kind and known.speaks_of_kind(kind):
            return "kind"
        if subject and known.is_only_one_named(value) and self._subject_is_known(subject):
            return "single"
        if origin == Origin.NAMED and not _is_in_text_only(known, value):
            return "record"
        if spec.effect == "pay" and self._is_asked_refund(value):
            return "user"
        if spec.effect == "pay" and origin == Origin.OWN and not known.is_own_payee_spoken_of(value):
            return "known"
        return {Origin.OWN: "own", Origin.KNOWN: "known", Origin.NAMED: "named"}.get(origin, "outside")

    def _is_asked_refund(self, payee: str) -> bool:
        """Whether the request asks to give back an amount, and exactly that came from this payer."""
        known = self.knowledge
        came = known.received.get(norm(payee))
        return came is not None and came in known.said_amounts and known.asks_for(_REFUND)

    def _subject_is_known(self, subject: str) -> bool:
        """Whether the person whose contact detail this is was named by the user, by a member, or is one."""
        return self.knowledge.origin(subject) >= Origin.KNOWN

    def _object_trust(self, value: str, nouns: frozenset[str]) -> str:
        known = self.knowledge
        if known.says(value):
            return "user"
        record = known.find(value, nouns)
        if record is None:
            return "unknown"
        if record.made_here:
            return "made"
        if record.named:
            return "record"
        if known.is_selected(record):
            return "picked"
        mentioned = any(norm(label) in norm(text.text) for text in known.texts if text.named for label in record.labels)
        return "mentioned" if mentioned else "unknown"

    def _is_look_alike(self, value: str) -> bool:
        known = self.knowledge
        return looks_like(value, [*known.payees(), *known.me, *addresses_in(known.request)]) is not None

    def _explains(self, amounts: list[float], targets: list[str], standing: float) -> bool:
        """Whether each amount is the user's, or bounded by what the user's own records connect with the payee."""
        known = self.knowledge
        for amount in amounts:
            if amount <= 0:
                return False
            if amount in known.said_amounts or (targets and amount in known.amounts):
                continue
            bound = max([self._bound(target) for target in targets] or [standing])
            if amount > bound:
                return False
        return True

    def _bound(self, payee: str) -> float:
        """The most that goes to a payee unsaid: what was paid before and a little more; a refund, at most what came."""
        known = self.knowledge
        paid = [a for name, amounts in known.paid.items() if name == norm(payee) for a in amounts]
        for record in known.records:  # a payee by name: what the user paid under that name
            if record.origin == Origin.OWN and any(
                known.says(payee) and _mentions(label, payee) for label in record.labels
            ):
                paid.append(record.numbers.get("amount", 0.0))
        bound = max(paid, default=0.0) * (10_000 + self.config.raise_bps) / 10_000
        if known.asks_for(_REFUND):
            bound = max(bound, known.received.get(norm(payee), 0.0))
        return bound

    def _standing(self, id: str, nouns: frozenset[str]) -> float:
        """For a change of an own standing payment: a little more than it is now."""
        record = self.knowledge.find(id, nouns)
        if record is None or record.origin != Origin.OWN:
            return 0.0
        return record.numbers.get("amount", 0.0) * (10_000 + self.config.raise_bps) / 10_000

    def _is_large(self, amounts: list[float], targets: list[str], standing: float) -> bool:
        """A large part of the balance is asked for, unless the user said the amount or pays it already."""
        known = self.knowledge
        bound = max([self._bound(target) for target in targets] or [standing])
        if known.balance is None:
            return False
        unsaid = [amount for amount in amounts if amount not in known.said_amounts and amount > bound]
        return any(amount * 10_000 > known.balance * self.config.share_bps for amount in unsaid)

    def _mandate_refuses(self, spec: ToolSpec, arguments: Mapping[str, Any]) -> bool:
        if self._mandate is None:
            return False
        try:
            self._mandate(spec.name, arguments)
        except Refused:
            return True
        return False

    def _is_related(self, by_role: Mapping[str, list[tuple[str, Any]]]) -> bool:
        """A new entry has to do with the request: its title shares a telling word with it."""
        labels = [text for _, value in by_role.get("label", ()) for text in strings_in(value)]
        return not labels or any(self.knowledge.shares_word(label) for label in labels)

    def _is_spoken_day(self, by_role: Mapping[str, list[tuple[str, Any]]]) -> bool:
        """An entry lies on a day that the request speaks of, or a document that it names."""
        values = [text for _, value in by_role.get("when", ()) for text in strings_in(value)]
        days = {day for value in values for day in days_in(value)}
        return not days or self.knowledge.speaks_of_a_day(days)


def _refuse_denied(decision: Decision) -> None:
    if decision.answer == "deny":
        rules = ", ".join(decision.verdict.rules)
        raise Refused(f"{decision.tool} is refused: {rules}", rule=decision.verdict.rules[0], rules=rules)


def _is_in_text_only(known: Knowledge, value: str) -> bool:
    key = norm(value)
    return not any(record.named and key in record.fields for record in known.records)


def _ids_in(value: Any) -> Iterator[str]:
    """The ids in a value: of an attachment such as {"type": "file", "file_id": "19"} only what is called an id."""
    if isinstance(value, Mapping):
        ids = [item for name, item in value.items() if is_id(name)]
        yield from strings_in(ids or value)
    elif isinstance(value, list):
        for item in value:
            yield from _ids_in(item)
    else:
        yield from strings_in(value)


def _mentions(label: str, name: str) -> bool:
    return f" {norm(name)} " in f" {norm(label)} "


def _plain(value: Any) -> Any:
    """Results as mappings and lists: pydantic models and dataclasses are read field by field."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value
