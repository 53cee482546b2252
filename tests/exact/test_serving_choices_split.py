"""The choices of one request to a split model are what their seeds give alone, and leave nothing at any stage."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serving_peers import open_shards
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel, seed_of
from tessera.serving.paying.charging import Free
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio


async def test_choices_over_stages_are_what_their_seeds_give_alone() -> None:
    async with open_shards(2) as shards:
        app = create_app(GatewayConfig(), [LocalModel("m", shards.engine, CharTokenizer())], [Free()])
        asked: dict[str, Any] = {"model": "m", "prompt": "ab", "max_tokens": 6, "logprobs": 2}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as client:

            async def choices(**changes: Any) -> list[Any]:
                response = await client.post("/v1/completions", json=asked | changes)
                assert response.status_code == 200, response.text
                return response.json()["choices"]

            together = await choices(n=3, seed=7)
            alone = [(await choices(seed=seed_of(7, index)))[0] for index in range(3)]
            streamed = await client.post("/v1/completions", json=asked | {"n": 3, "seed": 7, "stream": True})
            vectors = await client.post("/v1/embeddings", json={"model": "m", "input": ["ab", "ab", "ba"]})
        await shards.settled()
    assert [choice["text"] for choice in together] == [choice["text"] for choice in alone]
    assert [choice["logprobs"] for choice in together] == [choice["logprobs"] for choice in alone]
    assert streamed.text.endswith("data: [DONE]\n\n")
    first, same, other = (data["embedding"] for data in vectors.json()["data"])
    assert first == same != other
