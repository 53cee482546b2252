"""What a guard must know about a tool: what it does to the world, and what each of its arguments means.

`infer` reads that from names, as a person would: `send_email(recipients, body)` sends, to `recipients`, the text
`body`. A tool whose name says nothing is taken to be consequential. Whoever offers tools may say it better, with a
`ToolSpec`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

__all__ = ["Effect", "Role", "Source", "ToolSpec", "infer", "infer_role", "is_id", "leaf_kind", "word_set"]


def word_set(text: str) -> frozenset[str]:
    """The words of a text, for tables of words."""
    return frozenset(text.split())


Effect = Literal["read", "fetch", "send", "pay", "write", "destroy", "control"]
Role = Literal["target", "url", "amount", "asset", "content", "label", "object", "control", "when", "plain"]

_VERBS: tuple[tuple[Effect, str], ...] = (
    ("pay", "pay buy purchase order transfer_money transfer withdraw swap bridge donate tip checkout subscribe"),
    ("control", "approve grant authorize set_password update_password change_password reset set_permission install run "
                "execute enable disable login register sign"),
    ("destroy", "delete remove cancel erase clear drop close archive revoke ban block kick unsubscribe overwrite"),
    ("fetch", "fetch browse visit open_url download crawl scrape navigate"),
    ("send", "send share post publish invite forward reply email mail message notify tweet comment upload push submit"),
    ("write", "create add append update set edit write insert reschedule schedule book reserve rename move copy save "
              "make mark star fork merge"),
    ("read", "get list search find read show check count look view query describe fetch_balance lookup retrieve is has "
             "who what summarize calculate current"),
)  # fmt: skip
_MONEY = re.compile(r"money|payment|transaction|funds|coin|token_transfer|invoice|refund|wallet")
_CONTROL = re.compile(
    r"password|secret|credential|permission|api_?key|two_factor|2fa|security|user_info|profile|"
    r"account_(?:info|settings)|setting"
)
_WEB = re.compile(r"web_?page|website|\burl\b|link|browser")
_ROLES: tuple[tuple[Role, str], ...] = (
    ("url", r"url|uri|link|href|webpage|website|endpoint"),
    ("control", r"password|secret|permissions?|role|scope|private_key|api_?key|token|visibility|street|city|phone|"
                r"first_name|last_name|new_password"),
    ("object", r"id|.+_id|ids|.+_ids|number|index|file_path|path|attachments?|branch"),
    ("target", r"to|cc|bcc|recipients?|receivers?|payee|beneficiary|iban|account|address|e?mails?|.+_e?mail|users?|"
               r"username|participants?|attendees?|invitees?|members?|channels?|group|room|collaborators?|contacts?|"
               r"hotel|restaurant|company|merchant|seller|vendor|shop|store|product|item|repo|repository|owner|wallet|"
               r"contract|spender|destination"),
    ("amount", r"amount|value|price|sum|total|units|quantity|qty|budget|limit|max_.+|fee|tip"),
    ("asset", r"asset|currency|coin|unit|denomination"),
    ("label", r"title|name|file_?name|subject|topic"),
    ("content", r"body|content|text|message|description|comment|note|memo|reason|caption|reply|code|data|location"),
    ("when", r".*(?:date|time|day|start|end|when|until|deadline).*"),
)  # fmt: skip
_ROLE_PATTERNS = [(role, re.compile(pattern)) for role, pattern in _ROLES]
_TEXT = word_set("body content description text message comment comments note notes review reviews bio about reason")
_LABELS = word_set("title name filename file_name subject label")


@dataclass(frozen=True, slots=True)
class Source:
    """Who could have written what a tool returns.

    Args:
        author: "own": only the user and the user's own systems write it. "outside": anybody may have. Otherwise the
            name of the field in each row that says who wrote the row; a row by one of the user's own names is the
            user's, by a member of a directory it is that member's, and by anybody else it is outside.
        text: fields of free text, beside the usual ones. Structured fields are the service's own.
        directory: each row is a person, a place or an account that the user's organisation has admitted; `kind` says
            which, in the words a request may use for them ("user users everyone").
        automatic: a directory that anybody can get into, such as contacts made from received mail: it resolves a name
            that the user said, and grants nothing by itself.
        identity: what is returned names the user: addresses and accounts that are the user's own.
        paid: fields of a row by the user that name who was paid, and "amount" how much.
    """

    author: str = "outside"
    text: tuple[str, ...] = ()
    directory: bool = False
    kind: str = ""
    automatic: bool = False
    identity: bool = False
    balance: bool = False
    paid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One tool, for the guard.

    Args:
        roles: what each argument means; one that is not named is `plain` for a tool that reads, else `content`.
        subject: the argument that says who a contact detail belongs to, such as `user` beside `user_email`.
        preload: argument sets with which the guard itself calls the tool before the model runs, to know the user's own
            records; only for tools that read. `preload_each` names an argument and the kind of a directory: once for
            each of its members.
        signs: it signs a transaction: without a simulation of it a person is asked.
        repeatable: the same call once more has no second effect, whatever interrupted the first one.
    """

    name: str
    effect: Effect
    roles: Mapping[str, Role] = field(default_factory=dict)
    source: Source = field(default_factory=Source)
    subject: str = ""
    preload: tuple[Mapping[str, object], ...] = ()
    preload_each: tuple[str, str] = ("", "")
    signs: bool = False
    repeatable: bool = False

    def role(self, argument: str) -> Role:
        return self.roles.get(argument, "plain" if self.effect == "read" else "content")


def infer(name: str, arguments: Iterable[str], source: Source | None = None) -> ToolSpec:
    """A spec from names alone.

    >>> infer("send_email", ["recipients", "subject", "body"]).effect
    'send'
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    effect, roles = _effect(words), {argument: infer_role(argument) for argument in arguments}
    if effect == "read" and "url" in roles.values():
        effect = "fetch"
    return ToolSpec(name, effect, roles, source or Source())


def infer_role(argument: str) -> Role:
    """What an argument of this name means."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", argument).lower()
    return next((role for role, pattern in _ROLE_PATTERNS if pattern.fullmatch(words)), "content")


@lru_cache(4_096)
def leaf_kind(name: str) -> Literal["id", "label", "text", ""]:
    """What a field of a result is, from its name: an id, what the row is called, free text, or a structured value."""
    name = name.lower()
    if is_id(name):
        return "id"
    return "label" if name in _LABELS else "text" if name in _TEXT else ""


@lru_cache(4_096)
def is_id(name: str) -> bool:
    return re.fullmatch(r"(?:.*_)?id_?", name.lower()) is not None


def _effect(words: str) -> Effect:
    """The first verb decides; about money and passwords, what the verb is about."""
    verb = words.split("_")[0]
    by_any = (effect for effect, verbs in _VERBS if set(words.split("_")) & set(verbs.split()))
    found: Effect = next((effect for effect, verbs in _VERBS if verb in verbs.split()), next(by_any, "control"))
    if found == "read":
        return "fetch" if _WEB.search(words) else "read"
    if _MONEY.search(words):
        return "pay"
    if found in ("write", "control") and _CONTROL.search(words):
        return "control"
    return found
