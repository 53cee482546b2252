"""A2A: an agent's card and its door by JSON-RPC (`a2a-sdk`), and a `Post` that knocks at others' doors.

Our signed messages travel as one raw part of an A2A message; the answer is one raw part too: the work that was fetched,
or a canonical object that says "taken" or which error. A2A's own identity is not asked: a message is who signed it.
Invariants: bodies and answers are bounded; every knock has a deadline; addresses come from the caller, and redirects
are not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
import httpx
from a2a.client import ClientConfig, ClientFactory
from a2a.client.errors import A2AClientError
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.request_handlers import DefaultRequestHandler
from a2a.server.routes import create_agent_card_routes, create_jsonrpc_routes
from a2a.server.tasks import InMemoryTaskStore
from a2a.types import AgentCapabilities, AgentCard, AgentInterface, AgentSkill, Part, Role, SendMessageRequest
from a2a.types import Message as A2AMessage
from a2a.utils.errors import A2AError

from tessera.agents.commerce.cards import Card
from tessera.agents.commerce.desk import Desk
from tessera.agents.commerce.messages import MESSAGE_LIMIT, Message
from tessera.agents.commerce.street import Sells
from tessera.core import encoding
from tessera.core.errors import Invalid, Late, Missing, TesseraError, Unavailable, from_dict
from tessera.core.ids import Account

__all__ = ["A2APost", "agent_card", "door_routes"]

RPC_PATH = "/a2a"
MEDIA = "application/vnd.tessera.message"
WORK_MEDIA = "application/octet-stream"
ANSWER_LIMIT = 96 * 2**20  # bytes: a work in base64
KNOCK_S = 60.0


def agent_card(card: Card) -> AgentCard:
    """What A2A clients read at `/.well-known/agent-card.json`."""
    skills = [
        AgentSkill(id=kind, name=kind, description=f"from {units} units, paid through an escrow", tags=["paid"])
        for kind, units in sorted(card.services.items())
    ]
    door = AgentInterface(url=card.url, protocol_binding="JSONRPC", protocol_version="1.0")
    return AgentCard(
        name=card.name, description=card.about or card.name, version="1", supported_interfaces=[door],
        capabilities=AgentCapabilities(streaming=False), default_input_modes=[MEDIA],
        default_output_modes=[MEDIA, WORK_MEDIA], skills=skills,
    )  # fmt: skip


def door_routes(card: Card, desk: Desk, seller: Sells | None = None) -> list[Any]:
    """Starlette routes: the card, and `POST /a2a`."""
    public = agent_card(card)
    handler = DefaultRequestHandler(_Door(desk, seller), InMemoryTaskStore(), public)
    return [*create_agent_card_routes(public), *create_jsonrpc_routes(handler, RPC_PATH)]


class _Door(AgentExecutor):
    """Takes messages to the desk, and works to whom they are due."""

    def __init__(self, desk: Desk, seller: Sells | None) -> None:
        self._desk, self._seller = desk, seller

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        try:
            part = Part(raw=await self._take(context.message), media_type=WORK_MEDIA)
        except TesseraError as error:
            part = Part(raw=encoding.encode({"error": _plain(error)}), media_type=MEDIA)
        answer = A2AMessage(message_id=f"re-{context.message.message_id}"[:80] if context.message else "re",
                            role=Role.ROLE_AGENT, parts=[part])  # fmt: skip
        await event_queue.enqueue_event(answer)

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise Invalid("a message cannot be taken back")

    async def _take(self, sent: A2AMessage | None) -> bytes:
        if sent is None or len(sent.parts) != 1 or not sent.parts[0].raw:
            raise Invalid("a message has one raw part")
        if len(sent.parts[0].raw) > MESSAGE_LIMIT:
            raise Invalid(f"a message has at most {MESSAGE_LIMIT} bytes")
        message = Message.decode(sent.parts[0].raw)
        if message.kind == "fetch":
            if self._seller is None:
                raise Missing("nothing is sold here")
            return await self._seller.hand_over(message)
        self._desk.receive(message)
        return encoding.encode({"taken": message.id})


def _plain(error: TesseraError) -> dict[str, Any]:
    fields = {name: value for name, value in error.fields.items() if isinstance(value, (str, int, float, bool))}
    return {"code": error.code, "message": error.message[:500], "fields": fields}


class A2APost:
    """A `Post` over HTTP.

    Args:
        doors: where each account takes messages, such as `Card.url`.
        transport: how to reach them; None = over the network.
    """

    def __init__(self, doors: Mapping[Account, str], *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.doors = dict(doors)
        self._http = httpx.AsyncClient(transport=transport, timeout=KNOCK_S, follow_redirects=False)

    async def deliver(self, message: Message) -> None:
        await self._knock(message)

    async def fetch(self, message: Message) -> bytes:
        return await self._knock(message)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _knock(self, message: Message) -> bytes:
        url = self.doors.get(message.recipient)
        if url is None:
            raise Missing(f"nobody knows where {message.recipient} is")
        door = AgentInterface(url=url, protocol_binding="JSONRPC", protocol_version="1.0")
        card = AgentCard(name="agent", version="1", supported_interfaces=[door])
        config = ClientConfig(streaming=False, httpx_client=self._http)
        part = Part(raw=message.encode(), media_type=MEDIA)
        sent = A2AMessage(message_id=message.id, role=Role.ROLE_USER, parts=[part])
        try:
            with anyio.fail_after(KNOCK_S):
                client = ClientFactory(config).create(card)
                async for answer in client.send_message(SendMessageRequest(message=sent)):
                    return _read(answer.message)
        except TimeoutError as error:
            raise Late(f"{message.recipient} does not answer within {KNOCK_S:g} s") from error
        except (A2AClientError, A2AError, httpx.HTTPError) as error:
            raise Unavailable(f"{message.recipient} cannot be reached: {type(error).__name__}") from error
        raise Unavailable(f"{message.recipient} answers nothing")


def _read(answer: A2AMessage) -> bytes:
    """Raises: the error that the other side sent; Invalid for what is no answer."""
    if len(answer.parts) != 1 or len(answer.parts[0].raw) > ANSWER_LIMIT:
        raise Invalid("the answer has not one bounded part")
    part = answer.parts[0]
    if part.media_type != MEDIA:
        return part.raw
    value = encoding.decode(part.raw, 16_384)
    raise from_dict(value.get("error") if isinstance(value, dict) else None)
