"""The gateway of the benchmark, in a process of its own: an upstream, or a fake engine that costs nothing.

    python benchmarks/gateway_process.py PORT [UPSTREAM_URL]

Served as the product serves it: `server_config`, with limits, metrics and payment's seam (for nothing) in place.
"""

from __future__ import annotations

import logging
import sys

import structlog
import uvicorn

from tessera.serving.callers import CallerLimits
from tessera.serving.engine import FakeEngine
from tessera.serving.gateway import GatewayConfig, create_app
from tessera.serving.local import LocalModel
from tessera.serving.paying.charging import Free
from tessera.serving.server import server_config
from tessera.serving.text import CharTokenizer
from tessera.serving.upstreams.upstream import Target, Upstream
from tessera.serving.work import ServedModel

LIMITS = CallerLimits(requests_per_minute=10**7, tokens_per_minute=10**9, concurrent=10_000)  # all are one address


def main(port: int, url: str) -> None:
    logging.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    models: list[ServedModel] = [LocalModel("local", FakeEngine(), CharTokenizer())]
    if url:
        models.append(Upstream("stub", [Target(url)]))
    app = create_app(GatewayConfig(max_concurrent=1_000, callers=LIMITS), models, [Free()])
    uvicorn.Server(server_config(app, host="127.0.0.1", port=port, log_config=None)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
