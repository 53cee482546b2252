"""Payments through Permit2, as official clients sign them, and with changes by a cheat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eth_account import Account as EthAccount
from x402.mechanisms.evm.constants import PERMIT2_WITNESS_TYPES, UPTO_PERMIT2_WITNESS_TYPES

from chain_support import CHAIN_ID, NOW, key
from tessera.chain.faces import Coin, X402ExactProxy, X402UptoProxy
from tessera.chain.genesis import EXACT_PROXY, PERMIT2, UPTO_PROXY, standard_contracts
from tessera.chain.types import Chain
from tessera.core.ids import Account
from tessera.core.signing import AccountKey

PAYER, PAYEE, FACILITATOR = key("payer"), key("payee").account, key("facilitator")
MOST = 1_000


@dataclass(frozen=True)
class Signed:
    """What `settle` takes."""

    permit: tuple[tuple[Account, int], int, int]
    owner: Account
    witness: tuple[Any, ...]
    signature: bytes


def signed(coin: Account, scheme: str, *, signer: AccountKey = PAYER, **changes: Any) -> Signed:
    """A payment of `PAYER` to `PAYEE`; `changes` are made before it is signed."""
    fields = {
        "token": coin, "amount": MOST, "nonce": 5, "deadline": NOW + 600, "to": PAYEE, "validAfter": 0,
        "facilitator": FACILITATOR.account, "spender": UPTO_PROXY if scheme == "upto" else EXACT_PROXY,
        "owner": signer.account, "chainId": CHAIN_ID, "verifyingContract": PERMIT2,
    } | changes  # fmt: skip
    types = UPTO_PERMIT2_WITNESS_TYPES if scheme == "upto" else PERMIT2_WITNESS_TYPES
    witness = {field["name"]: fields[field["name"]] for field in types["Witness"]}
    permitted = {"token": fields["token"], "amount": fields["amount"]}
    message = {"permitted": permitted, "witness": witness} | {n: fields[n] for n in ("spender", "nonce", "deadline")}
    domain = {"name": "Permit2", "chainId": fields["chainId"], "verifyingContract": fields["verifyingContract"]}
    signature = bytes(EthAccount.sign_typed_data(signer.secret, domain, types, message).signature)
    permit = ((fields["token"], fields["amount"]), fields["nonce"], fields["deadline"])
    return Signed(permit, fields["owner"], tuple(witness.values()), signature)


async def coin_for_permit2(chain: Chain, payer: AccountKey = PAYER, units: int = 10 * MOST) -> Coin:
    """A coin of which `payer` has some, and for which it has approved Permit2 once."""
    coin = await Coin.deploy(chain, payer)
    await coin.mint(payer, payer.account, units)
    await coin.approve(payer, PERMIT2, 2**256 - 1)
    return coin


async def standard_on(chain: Any) -> tuple[X402ExactProxy, X402UptoProxy]:
    """The proxies; on anvil, which has no contracts of ours in its first block, their code is set."""
    for account, code in standard_contracts().items():
        if await chain.code(account) != code:
            await chain.request("anvil_setCode", [account, "0x" + code.hex()])
    return X402ExactProxy(chain, EXACT_PROXY), X402UptoProxy(chain, UPTO_PROXY)
