"""The life of a job: without bond and hook, with both, and the other ways in which one is funded or ends.

A life is the sum of all its calls; the hook is one that does nothing, because what it does is its own affair.
"""

from __future__ import annotations

from chain_support import NOW
from escrow_world import CLIENT, DEADLINE, EVALUATOR, PROVIDER, QUIET, REASON, STRANGER, WORK, deploy_code, escrow_world
from tessera.chain.client import RpcChain
from tessera.chain.consent import NOBODY
from tessera.chain.types import Receipt


async def table(chain: RpcChain) -> dict[str, int]:
    world = await escrow_world(chain)
    escrow = world.escrow
    used: dict[str, int] = {}

    def note(name: str, receipt: Receipt) -> None:
        used[name] = receipt.gas_used

    await world.submitted()  # so that no later figure is that of a first time
    evaluator, provider = EVALUATOR.account, PROVIDER.account
    note("createJob", await escrow.createJob(CLIENT, provider, evaluator, DEADLINE, "Label 20 pictures"))
    note("setBudget", await escrow.setBudget(CLIENT, 2, 10**6))
    note("fund", await escrow.fund(CLIENT, 2, 10**6))
    note("submit", await escrow.submit(PROVIDER, 2, WORK))
    note("complete", await escrow.complete(EVALUATOR, 2, REASON))
    used["life without bond and hook"] = sum(used.values())
    hook, before = await deploy_code(chain, QUIET), sum(used.values())
    terms = (provider, evaluator, DEADLINE, "Label 20 pictures", hook, 5_000, 10**5)
    note("createJob, bond and hook", await escrow.createJob(CLIENT, *terms))
    note("setBudget, bond and hook", await escrow.setBudget(CLIENT, 3, 10**6))
    note("postBond", await escrow.postBond(EVALUATOR, 3))
    note("fund, bond and hook", await escrow.fund(CLIENT, 3, 10**6))
    note("submit, bond and hook", await escrow.submit(PROVIDER, 3, WORK))
    note("complete, bond and hook", await escrow.complete(EVALUATOR, 3, REASON))
    used["life with bond and hook"] = sum(used.values()) - before
    job = await world.open(provider=None)
    note("setProvider", await escrow.setProvider(CLIENT, job, provider))
    note("reject, open", await escrow.reject(CLIENT, job, REASON))
    note("reject, submitted", await escrow.reject(EVALUATOR, await world.submitted(), REASON))
    note("withdrawBond", await escrow.withdrawBond(EVALUATOR, await world.open(bond=9)))
    job = await world.open()
    signed = await world.authorization(job)
    note("fundWithAuthorization", await escrow.fundWithAuthorization(STRANGER, job, 1_000, *signed))
    silent = await world.submitted(bond=500, on_silence=5_000, hook=NOBODY)
    await world.later(DEADLINE - NOW + 10**8)
    note("claimRefund, not submitted", await escrow.claimRefund(STRANGER, job))
    note("claimRefund, silence", await escrow.claimRefund(STRANGER, silent))
    return used
