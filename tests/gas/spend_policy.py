"""A mandate's life: opened, paid from, handed down twice, changed and revoked."""

from __future__ import annotations

from chain_support import CHAIN_ID, WORKERS
from gas import HOLDERS
from tessera.chain import artifact
from tessera.chain.faces import Coin, SpendPolicy
from tessera.chain.spending import child_id, cosign_digest, mandate_id, revoke_digest, spend_digest
from tessera.chain.types import Chain, Receipt
from tessera.core.signing import AccountKey
from tessera.incentives.spend_twin import Limits, Payment, Terms

OWNER, AGENT, OPERATOR, COSIGNER = WORKERS
CHILD, GRANDCHILD, RELAYER, PAYEE = HOLDERS[:4]
LABEL = b"\x01" * 32
LONG = 2**40


async def table(chain: Chain) -> dict[str, int]:
    deployed = await chain.send(OWNER, None, artifact.load("spend_policy").init_code())
    assert deployed.contract is not None
    coin, policy = await Coin.deploy(chain, OWNER), SpendPolicy(chain, deployed.contract)
    await coin.mint(OWNER, OWNER.account, 10**12)
    await coin.transfer(OWNER, PAYEE.account, 1)
    await coin.approve(OWNER, policy.address, 10**12)
    terms = Terms(AGENT.account, OPERATOR.account, COSIGNER.account, coin.address, 10**7, 10**5)
    limits, payees = Limits(10**9, 10**10, 10**8, LONG), [PAYEE.account]
    root = mandate_id(OWNER.account, LABEL)
    child, grandchild = child_id(root, LABEL), child_id(child_id(root, LABEL), LABEL)

    async def pay(mandate: bytes, signer: AccountKey, number: int, amount: int = 10**6) -> Receipt:
        """By the mandate's agent, and the co-signer where the amount asks for him."""
        payment = Payment(mandate, PAYEE.account, amount, bytes([number]) * 32, LABEL, 1, LONG)
        signature = signer.sign_digest(spend_digest(CHAIN_ID, policy.address, payment))
        cosignature = COSIGNER.sign_digest(cosign_digest(CHAIN_ID, policy.address, payment))
        return await policy.spend(RELAYER, payment, signature, cosignature if amount > limits.cosign_above else None)

    revocation = AGENT.sign_digest(revoke_digest(CHAIN_ID, policy.address, root))
    receipts = {
        "deployment": deployed,
        "open": await policy.open(OWNER, LABEL, terms, limits, payees),
        "delegate": await policy.delegate(AGENT, root, LABEL, CHILD.account, 10**7, limits, payees),
        "delegate again": await policy.delegate(CHILD, child, LABEL, GRANDCHILD.account, 10**7, limits, payees),
        "first payment": await pay(root, AGENT, 1),
        "payment": await pay(root, AGENT, 2),
        "payment with co-signer": await pay(root, AGENT, 3, 10**9),
        "first payment by a child": await pay(child, CHILD, 4),
        "payment by a child": await pay(child, CHILD, 5),
        "first payment by a grandchild": await pay(grandchild, GRANDCHILD, 6),
        "payment by a grandchild": await pay(grandchild, GRANDCHILD, 7),
        "propose": await policy.propose(OPERATOR, root, limits, payees),
        "tighten": await policy.tighten(OPERATOR, root, limits._replace(per_payment=10**8), []),
        "revoke by signature": await policy.revoke(RELAYER, root, revocation),
        "revoke": await policy.revoke(OWNER, child),
    }
    return {name: receipt.gas_used for name, receipt in receipts.items()}
