"""A coin that calls back during `claim`, `distribute` and `redeem`: the lock holds, and nobody is paid twice.

Known from The DAO (2016) and every reward contract that paid before it booked.
"""

from __future__ import annotations

from typing import Any

import boa
from boa.environment import Env

from chain_support import ROOT, RUN_ID, WORKERS
from tessera.core.ids import Account
from tessera.core.merkle import MerkleTree, share_leaf

EVIL_COIN = """
# pragma version 0.4.3
interface Share:
    def claim(holder: address) -> uint256: nonpayable
    def distribute() -> uint256: nonpayable

balanceOf: public(HashMap[address, uint256])
target: address
method: uint256
calls: public(uint256)

@external
def arm(target: address, method: uint256):
    self.target = target
    self.method = method

@external
def mint(receiver: address, amount: uint256):
    self.balanceOf[receiver] += amount

@external
def transfer(receiver: address, amount: uint256) -> bool:
    self.calls += 1
    if self.calls < 4 and self.method == 1:
        extcall Share(self.target).claim(receiver)
    if self.calls < 4 and self.method == 2:
        extcall Share(self.target).distribute()
    self.balanceOf[msg.sender] -= amount
    self.balanceOf[receiver] += amount
    return True
"""


def test_a_coin_that_calls_back_gets_nothing() -> None:
    with boa.swap_env(Env()):
        share_code = boa.load_partial(str(ROOT / "contracts" / "model_share.vy"))
        coin_code = boa.loads_partial(EVIL_COIN)
        for method in (1, 2):
            attack(coin_code.deploy(), share_code, method)


def attack(coin: Any, share_code: Any, method: int) -> None:
    accounts = [k.account for k in WORKERS]
    share = share_code.deploy("M", "M", coin, bytes.fromhex(RUN_ID), accounts)
    holder = Account(boa.env.generate_address("holder"))
    tree = MerkleTree([share_leaf(0, holder, 4)])
    digest = share.digest(0, tree.root, 4)
    share.post(0, tree.root, 4, [k.sign_digest(digest) for k in WORKERS])
    share.redeem(0, holder, 4, [])
    coin.mint(share, 100)
    share.distribute()
    coin.arm(share, method)
    with boa.reverts():
        share.claim(holder)
    assert coin.balanceOf(holder) == 0
    assert share.claimable(holder) == 100
    coin.arm(share, 0)
    share.claim(holder)
    assert (coin.balanceOf(holder), share.held(), coin.balanceOf(share)) == (100, 0, 0)
