"""Chats as a model was trained on them: its template renders the messages, its tokenizer's markers stay its own.

The template runs in a process of its own (`chat_template_child`), which is believed no more than the checkpoint that it
came with: every answer has a deadline and a limit, and when it dies or is late, the next request starts another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from tessera.core.clock import Clock
from tessera.core.errors import Invalid, Unavailable

__all__ = ["ChatTokenizer", "TemplateChat"]

START_S, RENDER_S = 20.0, 5.0  # Python and Jinja take a tenth of a second to start, on a busy machine several
WAIT_S = 10.0  # for the chats before; one takes under a millisecond
ANSWER_LIMIT = 8 << 20  # bytes
_CHILD = (sys.executable, "-m", "tessera.serving.chat_template_child")
_GONE = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.IncompleteRead, anyio.DelimiterNotFound)


class ChatTokenizer(Protocol):
    """What a chat asks of a tokenizer; `tessera.models.plain_tokenizer.PlainTokenizer` is one."""

    def guarded(self, text: str) -> str:
        """`text` so that no marker of the model's is in it."""
        ...

    def encode_chat(self, rendered: str) -> list[int]: ...


class TemplateChat:
    """Makes prompts of conversations. An async context manager; inside it, `prompt` may be called at any time.

    Args:
        source: the template, in Jinja.
        named: texts of tokens that it may name, such as bos_token.
    """

    def __init__(self, source: str, named: Mapping[str, str], tokenizer: ChatTokenizer, clock: Clock) -> None:
        self._source, self._named, self._tokenizer, self._clock = source, dict(named), tokenizer, clock
        self._one = anyio.Lock()
        self._child: Process | None = None
        self._answers: BufferedByteReceiveStream | None = None

    async def __aenter__(self) -> Self:
        """Raises: Invalid: it is no template, or cannot render the simplest chat."""
        try:
            await self.prompt([("user", "hello")])
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def prompt(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The tokens that ask for the next message.

        Raises: Invalid: the template refuses these messages, fails or does not end; Unavailable: it cannot be started,
            or too many others wait.
        """
        said = [
            {"role": "system" if role == "developer" else role, "content": self._tokenizer.guarded(text)}
            for role, text in messages
        ]
        await self._my_turn()
        try:
            if self._child is None:
                await self._start()
            answer = await self._ask({"messages": said, "now": self._clock.time()}, RENDER_S)
        finally:
            self._one.release()
        return self._tokenizer.encode_chat(answer)

    async def _my_turn(self) -> None:
        try:
            with anyio.fail_after(WAIT_S):
                await self._one.acquire()
        except TimeoutError:
            raise Unavailable("too many chats wait for the template; nothing was charged", retry_after_s=2.0) from None

    async def _start(self) -> None:
        try:
            child = await anyio.open_process(_CHILD, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise Unavailable(f"the chat template's process does not start: {error.strerror}") from error
        if child.stdout is None:
            raise RuntimeError("the child has no output")
        self._child, self._answers = child, BufferedByteReceiveStream(child.stdout)
        try:
            await self._ask({"source": self._source, "named": self._named}, START_S)
        except BaseException:
            await self._end()
            raise

    async def _ask(self, what: dict[str, Any], timeout_s: float) -> str:
        """One question, one answer. A child that is late, dies or talks nonsense is ended."""
        child, answers = self._child, self._answers
        if child is None or child.stdin is None or answers is None:
            raise RuntimeError("the child was not started")
        answered = False
        try:
            with anyio.fail_after(timeout_s):
                await child.stdin.send(json.dumps(what).encode() + b"\n")
                answer = json.loads(await answers.receive_until(b"\n", ANSWER_LIMIT))
            answered = True
        except TimeoutError:
            raise Invalid(f"the chat template does not end within {timeout_s:g} s", param="messages") from None
        except _GONE:
            raise Invalid("the chat template takes more memory than it may", param="messages") from None
        finally:
            if not answered:
                await self._end()
        if "error" in answer:
            raise Invalid(answer["error"], param="messages")
        return str(answer["text"])

    async def _end(self) -> None:
        child, self._child, self._answers = self._child, None, None
        if child is not None:
            with suppress(ProcessLookupError):
                child.kill()
            with anyio.CancelScope(shield=True):
                await child.aclose()
