"""What agents pay for their reputation registry."""

from __future__ import annotations

from agent_world import AGENT, agents
from escrow_world import CLIENT, PROVIDER, escrow_world
from tessera.chain.client import RpcChain


async def table(chain: RpcChain) -> dict[str, int]:
    world = await agents(await escrow_world(chain))
    receipts = {
        "giveFeedback, first": await world.rate(90, await world.done(), tag="quality"),
        "giveFeedback, later": await world.rate(91, await world.done(), tag="quality"),
        "appendResponse": await world.reputation.appendResponse(
            PROVIDER, AGENT, CLIENT.account, 1, "ipfs://answer", bytes(32)
        ),
        "revokeFeedback": await world.reputation.revokeFeedback(CLIENT, AGENT, 1),
    }
    return {name: receipt.gas_used for name, receipt in receipts.items()}
