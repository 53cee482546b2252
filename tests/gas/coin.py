"""The coin, and what the chain itself charges for a call that does nothing."""

from __future__ import annotations

from eth_account import Account as EthAccount
from eth_account.messages import encode_typed_data

from chain_support import CHAIN_ID, WORKERS
from gas import HOLDERS
from tessera.chain import artifact
from tessera.chain.faces import Coin
from tessera.chain.types import Receipt


async def table(chain: RpcChain) -> dict[str, int]:
    payer, payee = WORKERS[0], HOLDERS[0]
    deployed = await chain.send(payer, None, artifact.load("coin").init_code())
    assert deployed.contract is not None
    coin = Coin(chain, deployed.contract)
    receipts = {
        "deployment": deployed,
        "mint": await coin.mint(payer, payer.account, 10**12),
        "transfer to a new account": await coin.transfer(payer, payee.account, 1_000),
        "transfer to a known account": await coin.transfer(payer, payee.account, 1_000),
        "approve": await coin.approve(payer, payee.account, 500),
        "transferFrom": await coin.transferFrom(payee, payer.account, payee.account, 500),
        "approve back to zero": await coin.approve(payer, payee.account, 0),
        "payment by signature": await pay_by_signature(coin),
        "plain call to an account": await chain.send(payer, HOLDERS[5].account, b"\x01\x00" * 40),
    }
    return {name: receipt.gas_used for name, receipt in receipts.items()}


async def pay_by_signature(coin: Coin) -> Receipt:
    names = ["from", "to", "value", "validAfter", "validBefore", "nonce"]
    kinds = ["address", "address", "uint256", "uint256", "uint256", "bytes32"]
    values = (WORKERS[0].account, HOLDERS[0].account, 77, 1, 2**40, b"\x33" * 32)
    domain = {"name": "Test USD", "version": "2", "chainId": CHAIN_ID, "verifyingContract": coin.address}
    fields = [{"name": name, "type": kind} for name, kind in zip(names, kinds, strict=True)]
    message = dict(zip(names, values, strict=True))
    signable = encode_typed_data(domain, {"TransferWithAuthorization": fields}, message)
    signature = bytes(EthAccount.sign_message(signable, WORKERS[0].secret).signature)
    vrs = (signature[64], signature[:32], signature[32:64])
    return await coin.transferWithAuthorization(HOLDERS[3], *values, *vrs)
