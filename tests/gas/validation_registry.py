"""What agents pay for their validation registry."""

from __future__ import annotations

from agent_world import AGENT, agents
from escrow_world import EVALUATOR, PROVIDER, REASON, WORK, escrow_world
from tessera.chain.client import RpcChain


async def table(chain: RpcChain) -> dict[str, int]:
    validation = (await agents(await escrow_world(chain))).validation
    receipts = {
        "validationRequest": await validation.validationRequest(PROVIDER, EVALUATOR.account, AGENT, "ipfs://w", WORK),
        "validationResponse": await validation.validationResponse(EVALUATOR, WORK, 90, "ipfs://r", REASON, "hard"),
    }
    return {name: receipt.gas_used for name, receipt in receipts.items()}
