"""A conversation in a terminal: lines in, answers as they are made, what each cost.

The event loop lives in a thread of its own and the terminal in the main one, so that a line is read as in any shell,
with its editing, and Ctrl-C stops the answer that is being made, and not the chat.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Protocol

from anyio.from_thread import BlockingPortal
from rich.console import Console

from tessera.core.amount import Amount
from tessera.core.errors import Invalid, TesseraError
from tessera.serving.asking import Paid, ServedName

__all__ = ["Chatter", "Conversation", "answer_once", "converse", "terminal_line"]

HELP = """\
/model [NAME]  show the models, or talk to another one
/new           begin a new conversation
/cost          what this chat has cost
/help          this
/quit          end; so does Ctrl-D
Ctrl-C stops an answer."""
COIN_DECIMALS = 6
TICK_S = 0.02  # within which Ctrl-C is heard
CLOSE_S = 10.0  # for a stopped answer to be let go of


class Chatter(Protocol):
    """What a conversation asks; `serving.asking.Asker` is one, and `serving.buyer.Buyer`."""

    @property
    def paid(self) -> Paid | None: ...

    async def models(self) -> list[ServedName]: ...

    def stream_chat(
        self, messages: list[dict[str, str]], *, model: str, **options: Any
    ) -> AsyncGenerator[str, None]: ...


@dataclass
class Conversation:
    """What was said to one model, as far as it still fits into the model's context, and what it cost."""

    chatter: Chatter
    model: str
    options: dict[str, Any] = field(default_factory=dict)  # of every request: max_tokens, temperature
    messages: list[dict[str, str]] = field(default_factory=list)
    spent: Counter[str] = field(default_factory=Counter)  # units, by what they are of
    answers: int = 0
    forgot: bool = False  # the last answer was given without the beginning of the conversation

    async def ask(self, question: str, show: Callable[[str], None]) -> None:
        """Puts the question and shows the answer's pieces. What was shown of an answer that ends early is kept.

        Raises: the endpoint's error; the question is forgotten then.
        """
        self.messages.append({"role": "user", "content": question})
        self.forgot = False
        answer: list[str] = []

        def shown(piece: str) -> None:
            answer.append(piece)
            show(piece)

        try:
            await self._stream(shown)
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
                self.answers += 1
            else:
                self.messages.pop()
            if (paid := self.chatter.paid) is not None:
                self.spent[paid.unit] += paid.units

    async def _stream(self, show: Callable[[str], None]) -> None:
        """Drops the oldest question and its answer as often as the endpoint says that all of it is too long."""
        fitting = list(self.messages)
        while True:
            stream = self.chatter.stream_chat(fitting, model=self.model, **self.options)
            try:
                async for piece in stream:
                    if len(fitting) < len(self.messages):
                        self.messages, self.forgot = list(fitting), True
                    show(piece)
                return
            except Invalid as error:
                if not _too_long(error) or len(fitting) < 3:
                    raise
            finally:
                await stream.aclose()
            fitting = fitting[2:]


def converse(
    portal: BlockingPortal, conversation: Conversation, console: Console, read_line: Callable[[], str | None]
) -> None:
    """Until `read_line` gives None or the user ends it. `portal` runs the event loop in which `conversation` lives."""
    while (line := read_line()) is not None:
        text = line.strip()
        if text.startswith("/"):
            if text in ("/quit", "/exit", "/q"):
                return
            _command(portal, conversation, console, text)
        elif text:
            answer_once(portal, conversation, console, console, line.rstrip())
            console.print()


def answer_once(
    portal: BlockingPortal, conversation: Conversation, console: Console, notes: Console, question: str
) -> bool:
    """One answer, as it comes, and a note of its price. False when there was none."""
    started, over = time.monotonic(), Event()
    spinner = notes.status("thinking… Ctrl-C stops")
    pieces = 0

    async def ask() -> None:
        try:
            await conversation.ask(question, show)
        finally:
            over.set()

    def show(piece: str) -> None:
        nonlocal pieces
        if not pieces:
            spinner.stop()
        pieces += 1
        console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
        console.file.flush()

    with spinner, _interrupts() as interrupted:
        future = portal.start_task_soon(ask)
        while not over.wait(TICK_S):
            if interrupted.is_set() and future.cancel():
                over.wait(CLOSE_S)  # until the stream is closed, so that no more is made and paid
                break
    if pieces:
        console.print()
    if not future.cancelled() and (error := future.exception()) is not None:
        if not isinstance(error, TesseraError):
            raise error
        notes.print(error.message, style="red", highlight=False, markup=False)
        return False
    _note(notes, conversation, time.monotonic() - started, stopped=future.cancelled())
    return True


@contextmanager
def _interrupts() -> Iterator[Event]:
    """Ctrl-C sets the event meanwhile, and interrupts nothing."""
    interrupted = Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _note(console: Console, conversation: Conversation, seconds: float, *, stopped: bool) -> None:
    parts = ["stopped: what was made is paid for" if conversation.spent else "stopped"] if stopped else []
    parts += ["the beginning was forgotten: it does not fit" if conversation.forgot else ""]
    if not stopped and (paid := conversation.chatter.paid) is not None:
        parts.append(_price(paid.units, paid.unit))
        if conversation.answers > 1:
            parts.append(f"{_price(conversation.spent[paid.unit], paid.unit)} in all")
        if paid.left is not None:
            parts.append(f"{_price(paid.left, paid.unit)} left")
    parts.append(f"{seconds:.1f} s")
    console.print(" · ".join(part for part in parts if part), style="dim", highlight=False)


def _command(portal: BlockingPortal, conversation: Conversation, console: Console, text: str) -> None:
    word, _, rest = text.partition(" ")
    if word == "/new":
        conversation.messages.clear()
        console.print("a new conversation", style="dim")
    elif word == "/cost":
        told = [_price(units, unit) for unit, units in conversation.spent.items()] or ["no price was told"]
        console.print(f"{conversation.answers} answers · " + " · ".join(told), style="dim", highlight=False)
    elif word == "/model":
        try:
            _choose(conversation, console, portal.call(conversation.chatter.models), rest.strip())
        except TesseraError as error:
            console.print(error.message, style="red", highlight=False, markup=False)
    else:
        known = word in ("/help", "/?")
        console.print(
            HELP if known else f"there is no {word}; /help tells what there is",
            style="dim",
            markup=False,
            highlight=False,
        )


def _choose(conversation: Conversation, console: Console, models: Sequence[ServedName], name: str) -> None:
    if not name:
        for model in models:
            mark, context = "→" if model.id == conversation.model else " ", f"  {model.context:,} tokens"
            line = f"{mark} {model.id}{context if model.context else ''}"
            console.print(line, style="dim", markup=False, highlight=False)
        return
    found = [model.id for model in models if model.id == name] or [m.id for m in models if name in m.id]
    if len(found) != 1:
        raise Invalid(f"{name!r} is no model here" if not found else f"{name!r} may be {', '.join(found[:5])}")
    conversation.model = found[0]
    console.print(f"talking to {found[0]}", style="dim", markup=False, highlight=False)


def _price(units: int, unit: str) -> str:
    """Coins of six decimals, as stablecoins have; the units of anything else as they are."""
    if unit == "tokens":
        return f"{units:,} tokens of your shares or key"
    return Amount(units, "USD").format(COIN_DECIMALS) if unit.startswith("eip155:") else f"{units} {unit}".strip()


def _too_long(error: Invalid) -> bool:
    """As OpenAI's code has it, or in words, as others do."""
    return error.fields.get("reason") == "context_length_exceeded" or "context length" in error.message.lower()


def terminal_line(prompt: str = "> ") -> Callable[[], str | None]:
    """Reads lines from the terminal, with editing, or from a pipe. None at the end, or at a second Ctrl-C."""
    if not sys.stdin.isatty():
        return lambda: sys.stdin.readline() or None
    with suppress(ImportError):  # it makes `input` edit; not everywhere
        import readline  # noqa: F401
    interrupted = False

    def read() -> str | None:
        nonlocal interrupted
        try:
            line = input(prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if interrupted:
                return None
            interrupted = True
            sys.stdout.write("\n(once more, or Ctrl-D, ends the chat)\n")
            return ""
        interrupted = False
        return line

    return read
