"""Payments through Permit2 and x402's proxies. The first nonce of a word costs a new slot, the others do not."""

from __future__ import annotations

from typing import Any

from chain_support import WORKERS
from gas import HOLDERS
from permit2_support import coin_for_permit2, signed, standard_on
from tessera.chain.faces import Permit2
from tessera.chain.genesis import PERMIT2


async def table(chain: Any) -> dict[str, int]:
    exact, upto = await standard_on(chain)
    payer, facilitator, payee = WORKERS[0], HOLDERS[0], HOLDERS[1].account
    coin = await coin_for_permit2(chain, payer)
    fixed = {"signer": payer, "facilitator": facilitator.account, "to": payee, "deadline": 2**40}
    used: dict[str, int] = {}
    for nonce, name in ((0, "upto: first payment"), (1, "upto: a payment"), (2, "upto: a payment of all")):
        pay = signed(coin.address, "upto", nonce=nonce, **fixed)
        amount = pay.permit[0][1] if nonce == 2 else 40
        receipt = await upto.settle(facilitator, pay.permit, amount, pay.owner, pay.witness, pay.signature)
        used[name] = receipt.gas_used
    pay = signed(coin.address, "exact", nonce=3, **fixed)
    used["exact: a payment"] = (
        await exact.settle(HOLDERS[2], pay.permit, pay.owner, pay.witness, pay.signature)
    ).gas_used
    used["nonces taken back"] = (await Permit2(chain, PERMIT2).invalidateUnorderedNonces(payer, 7, 2**256 - 1)).gas_used
    return used
