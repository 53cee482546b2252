"""Whatever request the OpenAPI document allows or forbids: an answer that it describes, no 5xx but 503, nothing kept.

Half a minute of schemathesis in the slow suite; `TESSERA_FUZZ=10` (`make fuzz`) makes it five.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import anyio
import httpx
import pytest

from serving_sockets import listening
from serving_upstream import FakeUpstream, make_upstream
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import Free
from tessera.serving.text import CharTokenizer

pytestmark = pytest.mark.anyio
SECONDS = 30 * int(os.environ.get("TESSERA_FUZZ", "1"))
CONFIG = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "503"]\n'
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
POSTS = {"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}


class Tally:
    """An app that counts statuses by path."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.counts: Counter[tuple[str, int]] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.counts[scope["path"], message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counted)


async def test_the_document_names_every_route_and_status() -> None:
    app = create_app(GatewayConfig(), [LocalModel("m", FakeEngine(), CharTokenizer())], [Free()])
    document = app.openapi()
    assert set(document["paths"]) == {
        route.path.replace(":path", "") for route in app.routes if route.path[1:3] != "op"
    }
    for path in POSTS:
        operation = document["paths"][path]["post"]
        assert {"200", "400", "401", "402", "404", "408", "413", "429", "503", "504"} <= set(operation["responses"])
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert document["components"]["schemas"][name]["properties"]["model"]["enum"] == ["m"]
    assert set(document["components"]["securitySchemes"]) == {"api_key", "payment"}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
async def test_any_request_gets_an_answer_that_the_document_describes(tmp_path: Any) -> None:
    engine, fake = FakeEngine(), FakeUpstream()
    upstream = make_upstream(fake)
    app = create_app(
        GatewayConfig(max_concurrent=64), [LocalModel("ours", engine, CharTokenizer()), upstream], [Free()]
    )
    tally = Tally(app)
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    async with listening(tally) as url:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS,
                   "--max-time", str(SECONDS), "--seed", "7", "--no-color", "--no-shrink", "--warnings", "off",
                   "--suppress-health-check", "all", "--generation-database", "none"]  # fmt: skip
        done = await anyio.run_process(command, cwd=tmp_path, check=False)
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/healthz")).json()["active"] == 0
    assert done.returncode == 0, done.stdout.decode()[-8_000:]
    assert engine.open == fake.open == 0
    assert not {status for _, status in tally.counts if status >= 500} - {503}, tally.counts
    for path in POSTS:  # it came all the way through, and was refused too
        assert tally.counts[path, 200] > 5, tally.counts
        assert tally.counts[path, 400] > 5, tally.counts
    await upstream.aclose()
