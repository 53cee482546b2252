"""An upstream that costs next to nothing: raw HTTP/1.1 on asyncio, OpenAI's stream, a token every so many milliseconds.

    python benchmarks/gateway_stub.py PORT TOKEN_MS

Every stream's tokens come at their own pace from the request on, as a batching server's do: a late wake-up is caught up
with, so that a busy machine does not make the model slower.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(choices: list[Any], usage: Any = None) -> bytes:
    data = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "stub", "choices": choices}
    return chunk(b"data: " + json.dumps(data | ({"usage": usage} if usage else {})).encode() + b"\n\n")


TOKEN = event([{"index": 0, "delta": {"content": " token"}, "finish_reason": None, "logprobs": None}])
STOP = event([{"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}])


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token_s: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            count = body["max_tokens"]
            usage = {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}
            begun = loop.time()
            if body.get("stream"):
                writer.write(HEAD)
                for number in range(count):
                    await asyncio.sleep(begun + (number + 1) * token_s - loop.time())
                    writer.write(TOKEN)
                writer.write(STOP + event([], usage) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            else:
                await asyncio.sleep(count * token_s)
                message = {"role": "assistant", "content": " token" * count}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                answer = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "stub",
                                     "choices": [choice], "usage": usage}).encode()  # fmt: skip
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer)
                )
                writer.write(answer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


async def main(port: int, token_ms: float) -> None:
    server = await asyncio.start_server(lambda r, w: serve(r, w, token_ms / 1000), "127.0.0.1", port, backlog=1_024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
