"""A conversation in the terminal: what is shown, kept, forgotten, stopped and paid."""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from rich.console import Console

from tessera.cli.conversation import Conversation, answer_once, converse
from tessera.core.errors import Invalid, PaymentRequired
from tessera.serving.asking import Paid, ServedName

COIN = "eip155:1/0xabc"


class FakeChatter:
    """Answers with the last message's words, each a piece, for 1,000 units; has room for so many characters."""

    def __init__(self, room: int = 10_000, unit: str = COIN) -> None:
        self.room, self.unit = room, unit
        self.paid: Paid | None = None
        self.asked: list[list[dict[str, str]]] = []
        self.models_asked: list[str] = []
        self.error: Exception | None = None
        self.interrupt = False
        self.closed = 0

    async def models(self) -> list[ServedName]:
        return [ServedName("small", 512), ServedName("large", 0)]

    async def stream_chat(
        self, messages: list[dict[str, str]], *, model: str, **options: Any
    ) -> AsyncGenerator[str, None]:
        self.paid = None
        self.asked.append(messages)
        self.models_asked.append(model)
        if self.error is not None:
            raise self.error
        if sum(len(message["content"]) for message in messages) > self.room:
            raise Invalid("too long", reason="context_length_exceeded")
        try:
            for word in messages[-1]["content"].split():
                yield word + " "
                if self.interrupt:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    await anyio.sleep(30)
            self.paid = Paid(1_000, self.unit, left=5_000)
        finally:
            self.closed += 1


@pytest.fixture
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


def talk(portal: BlockingPortal, conversation: Conversation, *lines: str) -> str:
    """What the terminal shows."""
    shown = io.StringIO()
    left = iter(lines)
    read: Callable[[], str | None] = lambda: next(left, None)  # noqa: E731
    converse(portal, conversation, Console(file=shown, width=200), read)
    return shown.getvalue()


def test_the_conversation_goes_on_and_tells_its_price(portal: BlockingPortal) -> None:
    chatter = FakeChatter()
    conversation = Conversation(chatter, "small", {"max_tokens": 8})
    shown = talk(portal, conversation, "hello there", "", "and [bold]now[/bold]?")
    assert "hello there \n0.001 USD · 0.005 USD left" in shown
    assert "and [bold]now[/bold]? \n0.001 USD · 0.002 USD in all · 0.005 USD left" in shown
    assert [message["role"] for message in chatter.asked[1]] == ["user", "assistant", "user"]
    assert chatter.asked[1][1]["content"] == "hello there "


def test_what_does_not_fit_is_forgotten_from_the_beginning_and_said(portal: BlockingPortal) -> None:
    chatter = FakeChatter(room=26)
    conversation = Conversation(chatter, "small")
    shown = talk(portal, conversation, "one two", "three four", "five six")
    assert "forgotten" in shown.split("five six")[-1]
    kept = [message["content"] for message in conversation.messages]
    assert kept == ["five six", "five six "]  # 31 characters with the one before
    assert chatter.asked[-1][0]["role"] == "user"
    assert "too long" in talk(portal, conversation, "x" * 27)
    assert [message["content"] for message in conversation.messages] == kept


def test_ctrl_c_stops_the_answer_and_not_the_chat(portal: BlockingPortal) -> None:
    chatter = FakeChatter()
    conversation = Conversation(chatter, "small")
    talk(portal, conversation, "first one")
    chatter.interrupt = True
    shown = talk(portal, conversation, "a long story")
    assert "stopped: what was made is paid for" in shown
    assert (conversation.messages[-1]["content"], chatter.closed) == ("a ", 2)
    chatter.interrupt = False
    assert "go on" in talk(portal, conversation, "go on")
    assert conversation.answers == 3


def test_an_error_is_shown_and_the_question_forgotten(portal: BlockingPortal) -> None:
    chatter = FakeChatter()
    chatter.error = PaymentRequired("the payer's balance is too small")
    conversation = Conversation(chatter, "small")
    assert "balance is too small" in talk(portal, conversation, "hello")
    assert (conversation.messages, conversation.answers) == ([], 0)
    assert answer_once(portal, conversation, Console(file=io.StringIO()), Console(file=io.StringIO()), "x") is False


def test_the_commands(portal: BlockingPortal) -> None:
    chatter = FakeChatter(unit="tokens")
    conversation = Conversation(chatter, "small")
    shown = talk(
        portal, conversation, "/help", "/model", "/model lar", "hello", "/cost", "/new", "again", "/model x", "/what"
    )
    assert "/quit" in shown
    assert "→ small  512 tokens" in shown
    assert "talking to large" in shown
    assert "1 answers · 1,000 tokens" in shown
    assert "'x' is no model here" in shown
    assert "there is no /what" in shown
    assert (chatter.models_asked, len(chatter.asked[-1])) == (["large", "large"], 1)
    assert talk(portal, conversation, "/quit", "not asked") == ""
