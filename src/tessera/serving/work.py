"""What the gateway asks of a model that it serves: check a request, then do it.

A model may be ours, over peers, or an upstream behind a URL: the gateway pays, limits, counts and streams both alike.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal, Protocol

from tessera.serving.paying.charging import Usage

__all__ = ["Kind", "ServedModel", "Work"]

Kind = Literal["chat", "completion", "embedding"]


class Work(Protocol):
    """One request that can be served. Nothing is done until `whole` or `events` is awaited."""

    @property
    def prompt_tokens(self) -> int:
        """Exact where the tokenizer is ours, else an upper bound."""
        ...

    @property
    def max_tokens(self) -> int:
        """The most that the completion can be, of all choices together."""
        ...

    @property
    def choices(self) -> int:
        """Answers that are made at once: each takes a place."""
        ...

    @property
    def stream(self) -> bool: ...

    def usage(self) -> Usage:
        """Tokens read and made so far: what is paid for when the buyer leaves now."""
        ...

    async def whole(self) -> bytes:
        """The answer's body, in JSON. Raises: the core tree's errors."""
        ...

    def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events as they are made, all but what `ending` gives; b"" when a token shows nothing yet.

        Always the same iterator. Raises: the core tree's errors.
        """
        ...

    def ending(self, paid: Mapping[str, str]) -> bytes:
        """The last events of a complete stream: what closes each choice, and the usage where it was asked for.

        Args:
            paid: headers of a payment that was settled after the first byte; the last choice's closing event tells it.
        """
        ...

    async def aclose(self) -> None:
        """Frees what the work holds, wherever it is. Safe to call twice and before anything was done."""
        ...


class ServedModel(Protocol):
    """A model by its id."""

    @property
    def id(self) -> str: ...

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and completion together; None where only the upstream knows."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it is worth asking now."""
        ...

    async def plan(self, kind: Kind, data: Mapping[str, Any]) -> Work:
        """Checks the request body `data`. Raises: Invalid, with `param` and `reason`."""
        ...

    async def aclose(self) -> None:
        """The gateway is over."""
        ...
