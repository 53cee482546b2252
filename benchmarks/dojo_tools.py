"""AgentDojo's tools, as whoever offers them would describe them to the guard: who could have written what they return.

Effects and arguments are inferred from their names; stated here is what a name cannot say. Written from the tools'
signatures and return types, not from the benchmark's injections.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tessera.agents.tools import Source, ToolSpec, infer

PEOPLE = "user users everyone everybody people person colleague colleagues member members team employees teammates"
CHANNELS = "channel channels"
MESSAGES = Source(author="sender", text=("body",))
EVENTS = Source(author="outside", text=("description",))  # anybody may have sent the invitation
FILES = Source(author="outside", text=("content",))  # anybody with access may have written in it
PAYMENTS = Source(author="sender", paid=("recipient",), text=("subject",))

SOURCES: dict[str, Source] = {
    # mail: a contact is made from received mail, too
    "get_sent_emails": Source(author="sender"), "get_draft_emails": Source(author="sender"),
    "get_received_emails": MESSAGES, "get_unread_emails": MESSAGES, "search_emails": MESSAGES,
    "search_contacts_by_name": Source(author="own", directory=True, automatic=True),
    "search_contacts_by_email": Source(author="own", directory=True, automatic=True),
    "get_current_day": Source(author="own"),
    "search_calendar_events": EVENTS, "get_day_calendar_events": EVENTS,
    "search_files_by_filename": FILES, "get_file_by_id": FILES, "list_files": FILES, "search_files": FILES,
    # bank
    "get_iban": Source(author="own", identity=True), "get_user_info": Source(author="own", identity=True),
    "get_balance": Source(author="own", balance=True),
    "get_most_recent_transactions": PAYMENTS, "get_scheduled_transactions": replace(PAYMENTS, author="own"),
    # chat
    "get_channels": Source(author="own", directory=True, kind=CHANNELS),
    "get_users_in_channel": Source(author="own", directory=True, kind=PEOPLE),
    "read_channel_messages": MESSAGES, "read_inbox": MESSAGES,
    # travel
    "get_user_information": Source(author="own", identity=True),
}  # fmt: skip
PRELOAD: dict[str, tuple[dict[str, object], ...]] = {
    "get_iban": ({},), "get_user_info": ({},), "get_balance": ({},), "get_scheduled_transactions": ({},),
    "get_most_recent_transactions": ({"n": 100},), "get_user_information": ({},), "get_channels": ({},),
    "search_contacts_by_name": ({"query": ""},),
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "invite_user_to_slack": {"subject": "user"},
    "append_to_file": {"effect": "write"},
}


def describe(tools: Iterable[Any]) -> list[ToolSpec]:
    """A spec for each of a suite's functions."""
    specs = []
    for tool in tools:
        spec = infer(tool.name, tool.parameters.model_fields, SOURCES.get(tool.name))
        changes = CHANGES.get(tool.name, {})
        if tool.name == "get_users_in_channel":
            changes = {"preload_each": ("channel", CHANNELS)}
        specs.append(replace(spec, preload=PRELOAD.get(tool.name, ()), **changes))
    return specs
