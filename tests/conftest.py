"""What every test shares: anyio runs on asyncio, the only backend that the p2p engine supports."""

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
