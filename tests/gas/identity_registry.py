"""What agents pay for their identity registry."""

from __future__ import annotations

from agent_world import AGENT, agents
from chain_support import WORKERS
from escrow_world import PROVIDER, escrow_world
from tessera.chain.client import RpcChain


async def table(chain: RpcChain) -> dict[str, int]:
    identity = (await agents(await escrow_world(chain))).identity
    receipts = {
        "register": await identity.register(PROVIDER),
        "register with URI and metadata": await identity.register(PROVIDER, "ipfs://" + "a" * 52, [("model", b"a")]),
        "setAgentURI": await identity.setAgentURI(PROVIDER, AGENT, "ipfs://" + "b" * 52),
        "setMetadata": await identity.setMetadata(PROVIDER, AGENT, "model", b"b" * 32),
        "transferFrom": await identity.transferFrom(PROVIDER, PROVIDER.account, WORKERS[3].account, AGENT),
    }
    return {name: receipt.gas_used for name, receipt in receipts.items()}
