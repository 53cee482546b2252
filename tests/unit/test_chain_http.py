"""The chain's HTTP port as strangers use it: pages of any origin, wrong types, long bodies, too many requests."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from chain_support import CHAIN_ID, WORKERS, memory_chain
from tessera.chain.http import rpc_app
from tessera.chain.rates import RateConfig, RateLimit
from tessera.chain.rpc import HttpRpc
from tessera.core.errors import Invalid

pytestmark = pytest.mark.anyio
CHAIN_ID_CALL = {"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}
PAGE = "https://wallet.example"


def client(address: str = "10.0.0.1", app: Any = None, **settings: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app or rpc_app(memory_chain(), **settings), client=(address, 5_000))
    return httpx.AsyncClient(transport=transport, base_url="http://chain.test")


async def test_posts_are_answered_and_any_page_may_ask() -> None:
    async with client(body_limit=1_000) as http:
        asked = await http.post("/", json=CHAIN_ID_CALL, headers={"origin": PAGE})
        assert (asked.status_code, asked.json()["result"]) == (200, hex(CHAIN_ID))
        assert asked.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in asked.headers  # cookies count for nothing here
        preflight = await http.options("/", headers={"origin": PAGE, "access-control-request-method": "POST"})
        assert (preflight.status_code, preflight.content) == (204, b"")
        assert preflight.headers["access-control-allow-headers"] == "content-type"
        assert preflight.headers["access-control-allow-methods"] == "POST, OPTIONS"
        for method in ("GET", "PUT", "DELETE", "HEAD"):
            assert (await http.request(method, "/")).status_code == 405


async def test_a_page_cannot_send_what_no_wallet_signed() -> None:
    """Why any origin is safe: there is no account to borrow."""
    async with client() as http:
        send = {"from": WORKERS[0].account, "to": WORKERS[1].account, "value": "0x1"}
        for method, params in (
            ("eth_sendTransaction", [send]), ("eth_sign", [WORKERS[0].account, "0x11"]), ("personal_sign", []),
            ("personal_unlockAccount", []), ("eth_signTypedData_v4", []),
        ):  # fmt: skip
            body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            reply = (await http.post("/", json=body, headers={"origin": PAGE})).json()
            assert reply["error"]["code"] == -32601, method
        assert (await http.post("/", json=CHAIN_ID_CALL | {"method": "eth_accounts"})).json()["result"] == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
async def test_what_a_page_could_send_without_asking_first_is_refused(kind: str) -> None:
    async with client() as http:
        reply = await http.post("/", content=json.dumps(CHAIN_ID_CALL), headers={"content-type": kind})
        assert (reply.status_code, reply.text) == (415, "JSON-RPC: use content-type application/json")
    async with client() as http:
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await http.post("/", content=json.dumps(CHAIN_ID_CALL), headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "origin", ["null", "https://wallet.example.evil", "http://wallet.example", "https://WALLET.example", "", "*"]
)
async def test_with_a_list_of_origins_no_other_page_may_ask(origin: str) -> None:
    async with client(origins=[PAGE]) as http:
        listed = await http.post("/", json=CHAIN_ID_CALL, headers={"origin": PAGE})
        assert (listed.status_code, listed.headers["access-control-allow-origin"]) == (200, PAGE)
        assert listed.headers["vary"] == "origin"
        for method in ("POST", "OPTIONS"):
            other = await http.request(method, "/", json=CHAIN_ID_CALL, headers={"origin": origin})
            assert other.status_code == 403
            assert "access-control-allow-origin" not in other.headers
        assert (await http.post("/", json=CHAIN_ID_CALL)).status_code == 200  # no page at all


async def test_bodies_and_batches_are_limited() -> None:
    async with client(body_limit=1_000) as http:
        json_type = {"content-type": "application/json"}
        assert (await http.post("/", content=b"x" * 1_001, headers=json_type)).status_code == 413
        assert (await http.post("/", content=b"x" * 1_000, headers=json_type)).json()["error"]["code"] == -32700
        assert (await http.post("/", content=b"", headers=json_type)).json()["error"]["code"] == -32700
        nested = b"[" * 500 + b"]" * 500
        assert (await http.post("/", content=nested, headers=json_type)).json()[0]["error"]["code"] == -32600
        many = await http.post("/", content=b"[" + b"1," * 100 + b"1]", headers=json_type)
        assert many.json()["error"]["message"] == "a batch of 101 requests, 1 to 100 expected"


# --- the rate ---------------------------------------------------------------------------------------------------------


async def test_a_client_that_asks_in_a_loop_is_told_to_wait_and_others_are_served() -> None:
    app = rpc_app(memory_chain(), rate=RateConfig(rate_per_s=0.001, burst=3))
    async with client("10.0.0.1", app) as greedy, client("10.0.0.2", app) as modest:
        assert [(await greedy.post("/", json=CHAIN_ID_CALL)).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = await greedy.post("/", json=CHAIN_ID_CALL, headers={"origin": PAGE, "x-forwarded-for": "10.9.9.9"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, -32005)
        assert refused.json()["error"]["message"].startswith("too many requests from this address")
        assert int(refused.headers["retry-after"]) > 1
        assert refused.headers["access-control-allow-origin"] == "*"  # so that the page can read why
        assert (await modest.post("/", json=CHAIN_ID_CALL)).status_code == 200


async def test_a_batch_counts_as_what_is_in_it() -> None:
    app = rpc_app(memory_chain(), rate=RateConfig(rate_per_s=0.001, burst=3))
    async with client("10.0.0.1", app) as http:
        replies = (await http.post("/", json=[CHAIN_ID_CALL | {"id": i} for i in range(5)])).json()
        assert [reply["id"] for reply in replies] == [0, 1, 2, 3, 4]
        assert [reply.get("error", {}).get("code") for reply in replies] == [None, None, None, -32005, -32005]


async def test_the_rate_does_not_hold_in_process() -> None:
    chain = memory_chain()
    rpc_app(chain, rate=RateConfig(rate_per_s=0.001, burst=1))
    assert [chain.request("eth_chainId", []) for _ in range(1_000)] == [hex(CHAIN_ID)] * 1_000


async def test_our_own_client_reads_the_refusal() -> None:
    from tessera.core.errors import Unavailable

    app = rpc_app(memory_chain(), rate=RateConfig(rate_per_s=0.001, burst=1))
    rpc = HttpRpc("http://chain.test")
    rpc._http = client("10.0.0.1", app)
    assert await rpc.request("eth_chainId", []) == hex(CHAIN_ID)
    with pytest.raises(Unavailable, match="429"):
        await rpc.request("eth_chainId", [])


def test_a_bucket_fills_evenly_up_to_its_burst() -> None:
    now = [0.0]
    limit = RateLimit(RateConfig(rate_per_s=2, burst=4), lambda: now[0])
    assert [limit.wait_s("10.0.0.1") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    now[0] = 0.5
    assert [limit.wait_s("10.0.0.1") for _ in range(2)] == [0, 0.5]
    now[0] = 1_000.0
    assert [limit.wait_s("10.0.0.1") for _ in range(5)] == [0, 0, 0, 0, 0.5]


def test_one_household_is_one_client() -> None:
    limit = RateLimit(RateConfig(rate_per_s=0.001, burst=1))
    assert limit.wait_s("2001:db8:1:1::1") == 0
    assert limit.wait_s("2001:db8:1:1::2") > 0
    assert limit.wait_s("2001:db8:1:2::1") == 0
    assert limit.wait_s("::ffff:10.0.0.1") == 0
    assert limit.wait_s("10.0.0.1") > 0
    assert limit.wait_s("") == 0  # a Unix socket
    assert limit.wait_s("") > 0


def test_the_table_of_clients_is_bounded() -> None:
    limit = RateLimit(RateConfig(rate_per_s=0.001, burst=1, max_clients=10))
    for i in range(1_000):
        assert limit.wait_s(f"10.0.{i // 256}.{i % 256}") == 0
    assert len(limit._buckets) == 10
    assert limit.wait_s("10.0.3.231") > 0  # the last one is remembered
    assert limit.wait_s("10.0.0.0") == 0  # the first made room, and is new again


@pytest.mark.parametrize("wrong", [{"rate_per_s": 0}, {"burst": 0}, {"max_clients": 0}])
def test_a_limit_of_nothing_is_a_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="above zero"):
        RateConfig(**wrong)
