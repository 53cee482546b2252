"""Small hostile contracts for tests, compiled when they are first asked for."""

from __future__ import annotations

from functools import cache

from vyper import compile_code

HONEYPOT = """
# pragma version 0.4.3
event Transfer:
    sender: indexed(address)
    receiver: indexed(address)
    value: uint256
balanceOf: public(HashMap[address, uint256])
maker: address
@deploy
def __init__():
    self.maker = msg.sender
@external
def buy(amount: uint256):
    self.balanceOf[msg.sender] += amount
    log Transfer(sender=empty(address), receiver=msg.sender, value=amount)
@external
def transfer(receiver: address, amount: uint256) -> bool:
    assert msg.sender == self.maker, "trading is not open"
    self.balanceOf[msg.sender] -= amount
    self.balanceOf[receiver] += amount
    return True
"""
SHOP = """
# pragma version 0.4.3
# Sells for a coin that it may take; its habits are an honest one and the thief's.
interface Coin:
    def transferFrom(sender: address, receiver: address, amount: uint256) -> bool: nonpayable
    def approve(spender: address, amount: uint256) -> bool: nonpayable
thief: address
@deploy
def __init__(thief: address):
    self.thief = thief
@external
def buy(coin: Coin, amount: uint256):
    extcall coin.transferFrom(msg.sender, self, amount)
@external
def buy_and_more(coin: Coin, amount: uint256):
    extcall coin.transferFrom(msg.sender, self, amount)
    extcall coin.transferFrom(msg.sender, self.thief, amount)
@external
def buy_elsewhere(coin: Coin, amount: uint256):
    extcall coin.transferFrom(msg.sender, self.thief, amount)
@external
@payable
def take_ether():
    pass
"""
DEED = """
# pragma version 0.4.3
# One thing that is owned, with a way to lose it that has an innocent name.
event Transfer:
    sender: indexed(address)
    receiver: indexed(address)
    number: indexed(uint256)
event ApprovalForAll:
    owner: indexed(address)
    operator: indexed(address)
    approved: bool
event OwnershipTransferred:
    previous: indexed(address)
    new: indexed(address)
ownerOf: public(HashMap[uint256, address])
isApprovedForAll: public(HashMap[address, HashMap[address, bool]])
owner: public(address)
thief: address
@deploy
def __init__(thief: address, holder: address):
    self.thief = thief
    self.ownerOf[7] = holder
    self.owner = holder
@external
def claim_reward():
    self.ownerOf[7] = self.thief
    log Transfer(sender=msg.sender, receiver=self.thief, number=7)
@external
def register():
    self.isApprovedForAll[msg.sender][self.thief] = True
    log ApprovalForAll(owner=msg.sender, operator=self.thief, approved=True)
@external
def upgrade():
    self.owner = self.thief
    log OwnershipTransferred(previous=msg.sender, new=self.thief)
@external
def nothing():
    pass
"""


@cache
def bytecode(source: str) -> bytes:
    return bytes.fromhex(compile_code(source, output_formats=["bytecode"])["bytecode"].removeprefix("0x"))
