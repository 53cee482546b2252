"""Request shapes of clients that people use, as they send them: they work unchanged, streamed and not."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from serving_upstream import FakeUpstream, make_upstream
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import Free
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio

HELLO = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "open-webui": {
        "stream": True, "model": "MODEL", "messages": HELLO, "stream_options": {"include_usage": True},
        "temperature": 0.8, "max_tokens": 64, "metadata": {"chat_id": "c", "message_id": "m"},
        "user": {"name": "someone", "id": "u", "email": "s@example.org", "role": "user"},
    },
    "open-webui, naming the chat": {
        "model": "MODEL", "messages": [{"role": "user", "content": "### Task: a title"}], "stream": False,
        "max_completion_tokens": 50, "metadata": {"task": "title_generation"},
    },
    "langchain": {
        "messages": [{"content": "Hello", "role": "user"}], "model": "MODEL", "stream": False, "n": 1,
        "temperature": 0.7, "max_completion_tokens": 20, "stop": None, "logprobs": None,
    },
    "langchain, streamed": {
        "messages": [{"content": [{"type": "text", "text": "Hello"}], "role": "user"}], "model": "MODEL",
        "stream": True, "stream_options": {"include_usage": True}, "parallel_tool_calls": True,
    },
    "a conversation that comes back": {
        "model": "MODEL", "max_tokens": 20, "messages": [
            *HELLO,
            {"role": "assistant", "content": "Hi!", "refusal": None, "annotations": [], "audio": None,
             "function_call": None, "tool_calls": None},
            {"role": "user", "content": "Go on", "name": "someone"},
        ],
    },
    "librechat": {
        "model": "MODEL", "messages": HELLO, "stream": True, "user": "650f", "temperature": 1, "top_p": 1,
        "presence_penalty": 0, "frequency_penalty": 0,
    },
    "openai's reference": {
        "model": "MODEL", "messages": HELLO, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto",
        "logit_bias": {}, "modalities": ["text"], "store": False, "service_tier": "auto", "verbosity": "medium",
        "seed": 1, "stop": ["\n\n\n"], "top_logprobs": None, "safety_identifier": "x", "prompt_cache_key": "y",
    },
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("model", ["ours", "m"])
async def test_a_clients_body_is_taken_as_it_is(body: dict[str, Any], model: str) -> None:
    upstream = make_upstream(FakeUpstream())
    app = create_app(GatewayConfig(), [LocalModel("ours", FakeEngine(), CharTokenizer()), upstream], [Free()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        listed = await client.get("/v1/models", headers={"Authorization": "Bearer "})
        assert [card["id"] for card in listed.json()["data"]] == ["ours", "m"]
        response = await client.post("/v1/chat/completions", json=body | {"model": model})
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n")
        chunks = [json.loads(part[6:]) for part in response.text.split("\n\n")[:-2]]
        said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert bool(chunks[-1].get("usage")) == ("stream_options" in body)
    else:
        said = response.json()["choices"][0]["message"]["content"]
        assert response.json()["usage"]["total_tokens"] > 0
    assert said


async def test_what_our_answer_was_may_be_said_again_by_the_official_client() -> None:
    app = create_app(GatewayConfig(), [LocalModel("ours", FakeEngine(), CharTokenizer())], [Free()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        client = AsyncOpenAI(api_key="any", base_url="http://gateway/v1", http_client=http, max_retries=0)
        messages: list[Any] = [{"role": "user", "content": "hi"}]
        for _ in range(2):
            made = await client.chat.completions.create(model="ours", messages=messages, max_tokens=8)
            messages += [made.choices[0].message, {"role": "user", "content": "and?"}]
    assert made.usage is not None
    assert made.usage.prompt_tokens == len("hi\nhihihihi\nand?")


async def test_tools_are_refused_by_name_where_the_model_cannot_use_them() -> None:
    app = create_app(GatewayConfig(), [LocalModel("ours", FakeEngine(), CharTokenizer())], [Free()])
    asked: dict[str, Any] = {"model": "ours", "messages": HELLO}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        for change, param in (
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
            ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}]}, "messages"),
        ):
            response = await client.post("/v1/chat/completions", json=asked | change)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
