"""A load client that costs next to nothing: raw HTTP/1.1 on asyncio, so many callers in a closed loop.

    python benchmarks/gateway_client.py PORT MODEL CALLERS SECONDS TOKENS stream|whole

Prints one JSON object: requests, tokens, seconds, and of each request the first token's and the whole answer's time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[float, float, int]:
    """Seconds to the first byte of the body, seconds to its end, and tokens seen."""
    begun = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode())
    if b"transfer-encoding: chunked" not in head.lower():
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        ended = time.perf_counter() - begun
        return ended, ended, json.loads(body)["usage"]["completion_tokens"]
    first, seen = 0.0, b""
    tokens = 0
    while not seen.endswith(b"0\r\n\r\n"):
        data = await reader.read(65_536)
        first = first or time.perf_counter() - begun
        tokens += data.count(b'" token"')
        seen = (seen + data)[-16:]
        if not data:
            raise RuntimeError("the server hung up")
    return first, time.perf_counter() - begun, tokens


async def call(port: int, request: bytes, until: float, found: list[tuple[float, float, int]], wait_s: float) -> None:
    await asyncio.sleep(wait_s)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until:
        found.append(await ask(reader, writer, request))
    writer.close()


def make_request(model: str, tokens: int, how: str) -> bytes:
    asked = {"model": model, "messages": [{"role": "user", "content": "one two three four"}], "max_tokens": tokens}
    body = json.dumps(asked | {"stream": how == "stream"}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def main(port: int, model: str, callers: int, seconds: float, tokens: int, how: str) -> dict[str, Any]:
    request = make_request(model, tokens, how)
    begun, found = time.perf_counter(), list[tuple[float, float, int]]()
    spread = 2.0 / callers  # callers do not all come at once, but evenly over about an answer's time
    await asyncio.gather(*(call(port, request, begun + seconds, found, n * spread) for n in range(callers)))
    first, whole, made = zip(*found, strict=True)
    return {"seconds": time.perf_counter() - begun, "first_s": first, "whole_s": whole, "tokens": sum(made),
            "cpu_s": time.process_time()}  # fmt: skip


if __name__ == "__main__":
    arguments = [int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]), sys.argv[6]]
    print(json.dumps(asyncio.run(main(*arguments))))  # type: ignore[arg-type]
