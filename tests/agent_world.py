"""What the tests of the agents' registries share: the three of them beside an escrow, and an agent that does jobs."""

from __future__ import annotations

from dataclasses import dataclass

from escrow_world import CLIENT, EVALUATOR, PROVIDER, REASON, Escrow, local_escrow
from tessera.chain.agents import job_proof
from tessera.chain.client import RpcChain
from tessera.chain.faces import IdentityRegistry, ReputationRegistry, ValidationRegistry
from tessera.chain.types import Receipt
from tessera.core.signing import AccountKey

AGENT = 0  # PROVIDER's


@dataclass
class Agents:
    jobs: Escrow
    identity: IdentityRegistry
    reputation: ReputationRegistry
    validation: ValidationRegistry

    @property
    def chain(self) -> RpcChain:
        return self.jobs.chain

    async def done(self, client: AccountKey = CLIENT) -> int:
        """A completed job of the agent's."""
        job = await self.jobs.submitted(10, client=client)
        await self.jobs.escrow.complete(EVALUATOR, job, REASON)
        return job

    async def rate(
        self, value: int, job: int, *, client: AccountKey = CLIENT, agent: int = AGENT, decimals: int = 0, tag: str = ""
    ) -> Receipt:
        """Feedback with its proof."""
        return await self.reputation.giveFeedback(
            client, agent, value, decimals, tag, "second", job_proof(job), "ipfs://why", bytes(32)
        )


async def agents(jobs: Escrow | None = None) -> Agents:
    """PROVIDER has registered an agent, number 0."""
    jobs = jobs or await local_escrow()
    identity = await IdentityRegistry.deploy(jobs.chain, CLIENT)
    reputation = await ReputationRegistry.deploy(jobs.chain, CLIENT, identity.address, jobs.escrow.address)
    validation = await ValidationRegistry.deploy(jobs.chain, CLIENT, identity.address)
    await identity.register(PROVIDER, "ipfs://agent")
    return Agents(jobs, identity, reputation, validation)
