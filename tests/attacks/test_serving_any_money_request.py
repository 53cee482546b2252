"""Whatever is sent to the routes about money: an answer that their document describes, and nothing given away."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Any

import anyio
import pytest

from serving_sockets import listening
from serving_stack import open_stack
from tessera.serving.paying.prices import TokenPrice

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
EXAMPLES = 60 * int(os.environ.get("TESSERA_FUZZ", "1"))
CONFIG = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "503"]\n'
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.timeout(300 + 10 * EXAMPLES)
async def test_any_request_about_money_gets_an_answer_and_no_money(tmp_path: Any) -> None:
    stack = await open_stack(tokens=TokenPrice(100_000, 300_000))
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    counts: Counter[tuple[str, int]] = Counter()

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                counts[scope["path"], message["status"]] += 1
            await send(message)

        await stack.app(scope, receive, counted)

    async with listening(counting) as url:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS,
                   "--include-path-regex", "^/v1/(credit|sign-in|rights)", "--max-examples", str(EXAMPLES),
                   "--seed", "7", "--no-color", "--no-shrink", "--warnings", "off", "--suppress-health-check", "all",
                   "--generation-database", "none"]  # fmt: skip
        done = await anyio.run_process(command, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout.decode()[-8_000:]
    assert not {status for _, status in counts if status >= 500} - {503}, counts
    for path, status in (("/v1/credit", 402), ("/v1/credit", 400), ("/v1/sign-in", 403), ("/v1/sign-in", 400)):
        assert counts[path, status], counts  # it came all the way through, and was refused too
    assert stack.till is not None
    for kind in ("operator", "credit", "session"):
        assert await stack.till.keys.list(kind) == []  # type: ignore[arg-type]
    assert (await stack.income(), stack.payments.held, stack.engine.started) == (0, 0, 0)
