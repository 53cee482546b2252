"""Several choices, log-probabilities and embeddings of a model of ours, in OpenAI's shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tessera.serving.engine import FakeEngine, Sampling
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import FakePayments, Free, Payments, Usage
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
MODEL = "m"


def make_client(engine: FakeEngine, *ways: Payments, **settings: Any) -> httpx.AsyncClient:
    app = create_app(GatewayConfig(**settings), [LocalModel(MODEL, engine, CharTokenizer())], ways or [Free()])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def official(client: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="any", base_url="http://gateway/v1", http_client=client, max_retries=0)


def by_seed(prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """A reply whose text and length depend on the seed alone."""
    return list(f"{sampling.seed % 1000:03}".encode()) * (1 + sampling.seed % 3)


async def test_choices_differ_by_seed_alone_and_come_again_with_it() -> None:
    engine = FakeEngine(by_seed)
    async with make_client(engine) as client:
        asked = {"model": MODEL, "prompt": "ab", "n": 4, "seed": 7, "max_tokens": 20}
        body = (await client.post("/v1/completions", json=asked)).json()
        again = (await client.post("/v1/completions", json=asked)).json()
        alone = (await client.post("/v1/completions", json=asked | {"n": 1})).json()
    texts = [choice["text"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert texts == [choice["text"] for choice in again["choices"]]
    assert alone["choices"][0]["text"] == texts[0]
    assert body["usage"] == {
        "prompt_tokens": 2, "completion_tokens": sum(map(len, texts)), "total_tokens": 2 + sum(map(len, texts)),
    }  # fmt: skip
    assert engine.open == 0


async def test_streamed_choices_are_the_whole_ones_each_opened_and_closed_once() -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "n": 3, "seed": 5}
    async with make_client(FakeEngine(by_seed)) as client:
        whole = await official(client).chat.completions.create(**asked)
        stream = await official(client).chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    texts, roles, reasons = ["", "", ""], [0, 0, 0], [""] * 3
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role == "assistant"
            assert not reasons[choice.index], "a choice goes on after it was closed"
            reasons[choice.index] = choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == [1, 1, 1]
    assert reasons == ["stop"] * 3
    assert whole.usage is not None
    assert chunks[-1].usage == whole.usage


async def test_several_prompts_are_choices_in_order() -> None:
    async with make_client(FakeEngine()) as client:
        asked = {"model": MODEL, "prompt": ["ab", "xyz"], "n": 2, "max_tokens": 4}
        body = (await client.post("/v1/completions", json=asked)).json()
    assert [choice["text"] for choice in body["choices"]] == ["abab", "abab", "xyzx", "xyzx"]
    assert body["usage"]["prompt_tokens"] == 5


async def test_each_choice_takes_a_place_and_the_payment_covers_all() -> None:
    payments = FakePayments({"c1"})
    paid = {"PAYMENT-SIGNATURE": "c1"}
    engine = FakeEngine()
    async with make_client(engine, payments, max_concurrent=3) as client:
        asked = {"model": MODEL, "prompt": "ab", "max_tokens": 4}
        assert (await client.post("/v1/completions", json=asked | {"n": 4}, headers=paid)).status_code == 400
        assert engine.started == 0
        assert (await client.post("/v1/completions", json=asked | {"n": 3}, headers=paid)).status_code == 200
        assert (await client.get("/healthz")).json()["active"] == 0
    assert payments.metered == [Usage(2, 12)]


async def test_a_choice_that_breaks_breaks_the_answer_and_frees_the_others() -> None:
    engine = FakeEngine(fail_after=2)
    async with make_client(engine) as client:
        for stream in (False, True):
            asked = {"model": MODEL, "prompt": "ab", "n": 3, "stream": stream}
            response = await client.post("/v1/completions", json=asked)
            assert response.status_code == (200 if stream else 400)
            assert "told to fail" in response.text
            assert "[DONE]" not in response.text
    assert engine.open == 0


class Knowing(FakeEngine):
    """Tells log-probabilities that can be told apart."""

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Any:
        from tessera.serving.engine import Token

        async for token in super().generate(prompt, sampling):
            if sampling.logprobs is None:
                yield token
            else:
                top = tuple((token.id + place, -float(place)) for place in range(sampling.logprobs))
                yield Token(token.id, -0.5, (*top[:-1], (token.id + 9, -math.inf)) if top else ())


async def test_chat_tells_log_probabilities_streamed_and_not() -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a€b"}], "max_tokens": 5}
    asked |= {"logprobs": True, "top_logprobs": 2}
    async with make_client(Knowing()) as client:
        whole = await official(client).chat.completions.create(**asked)
        told = whole.choices[0].logprobs
        assert told is not None
        assert told.content is not None
        chunks = [chunk async for chunk in await official(client).chat.completions.create(**asked, stream=True)]
    streamed = [entry for chunk in chunks if (said := chunk.choices[0].logprobs) for entry in said.content or []]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in told.content]
    assert [entry.token for entry in told.content] == ["a", "\ufffd", "\ufffd", "\ufffd", "b"]
    assert [entry.bytes for entry in told.content] == [[97], None, None, None, [98]]
    assert {entry.logprob for entry in told.content} == {-0.5}
    first = told.content[0].top_logprobs
    assert [(top.token, top.logprob) for top in first] == [("a", 0.0), ("j", -9999.0)]


async def test_completions_tell_log_probabilities_of_what_is_shown() -> None:
    async with make_client(Knowing(lambda prompt, sampling: list(b"one STOP two"))) as client:
        asked = {"model": MODEL, "prompt": "x", "logprobs": 1, "stop": "STOP"}
        body = (await client.post("/v1/completions", json=asked)).json()
    told = body["choices"][0]["logprobs"]
    assert told["tokens"] == list("one ")
    assert told["text_offset"] == [0, 1, 2, 3]
    assert told["token_logprobs"] == [-0.5] * 4
    assert told["top_logprobs"][0] == {"x": -9999.0}
    assert body["usage"]["completion_tokens"] == len("one STOP")


async def test_a_likely_token_that_the_tokenizer_does_not_know_is_told_without_text() -> None:
    async with make_client(Knowing(lambda prompt, sampling: [255 - 8, 300])) as client:
        for path, asked in (
            ("/v1/completions", {"prompt": "x", "logprobs": 2}),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2},
            ),
        ):
            response = await client.post(path, json={"model": MODEL} | asked)
            assert response.status_code == 200
            assert response.json()["usage"]["completion_tokens"] == 2


async def test_top_logprobs_without_logprobs_is_refused() -> None:
    async with make_client(FakeEngine()) as client:
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}
        response = await client.post("/v1/chat/completions", json=asked)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "top_logprobs")


async def test_embeddings_have_length_one_in_either_form() -> None:
    async with make_client(FakeEngine()) as client:
        made = await official(client).embeddings.create(model=MODEL, input=["abc", "zz", "abc"])  # asks for base64
        plain = await official(client).embeddings.create(model=MODEL, input="abc", encoding_format="float")
        ids = await official(client).embeddings.create(model=MODEL, input=[[97, 98, 99]], encoding_format="float")
    vectors = [data.embedding for data in made.data]
    assert [data.index for data in made.data] == [0, 1, 2]
    assert all(math.isclose(sum(x * x for x in vector), 1.0, rel_tol=1e-6) for vector in vectors)
    assert vectors[0] == vectors[2] != vectors[1]
    assert plain.data[0].embedding == pytest.approx(vectors[0], rel=1e-6)
    assert ids.data[0].embedding == plain.data[0].embedding
    assert (made.usage.prompt_tokens, made.usage.total_tokens) == (8, 8)


@pytest.mark.parametrize(
    ("change", "param"),
    [({"input": []}, "input"), ({"input": ""}, "input"), ({"input": [""]}, "input"), ({"input": [[]]}, "input"),
     ({"input": [300]}, "input"), ({"input": "x" * 513}, "input"), ({"dimensions": 8}, "dimensions"),
     ({"encoding_format": "hex"}, "encoding_format"), ({"input": ["a"] * 257}, "input"), ({"stream": True}, "stream")],
)  # fmt: skip
async def test_a_wrong_embedding_request_is_named_and_costs_nothing(change: dict[str, Any], param: str) -> None:
    payments = FakePayments({"c1"})
    engine = FakeEngine()
    async with make_client(engine, payments) as client:
        asked = {"model": MODEL, "input": "abc"} | change
        response = await client.post("/v1/embeddings", json=asked, headers={"PAYMENT-SIGNATURE": "c1"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert (payments.settled, engine.started) == ([], 0)


async def test_an_embedding_is_paid_for_by_its_prompt() -> None:
    payments = FakePayments({"c1"})
    async with make_client(FakeEngine(), payments) as client:
        asked = {"model": MODEL, "input": ["abc", "de"]}
        response = await client.post("/v1/embeddings", json=asked, headers={"PAYMENT-SIGNATURE": "c1"})
    assert json.loads(response.text)["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert payments.metered == [Usage(5, 0)]
