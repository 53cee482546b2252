# pragma version 0.4.3
"""
@title x402 exact payments through Permit2
@license Apache-2.0
@notice Carries a payment of exactly the amount that its payer signed to the payee whom the payer signed. Anybody may
        carry it. It stands in a LocalChain's first block at the address of x402's own proxy, with the same interface,
        types and errors; on public chains the deployed one is used.

        What cannot happen: a payment of another amount, or to another payee, than its payer has signed. Whatever else
        Permit2 refuses is refused with Permit2's error.
@dev    No state and no coins, hence no lock. `settleWithPermit` is not here: it needs a coin with EIP-2612.
@custom:kill Nothing to stop: nobody has special rights. A payer takes back what is signed at Permit2.
"""

from modules import permit2_payment

WITNESS_TYPE: constant(bytes32) = keccak256("Witness(address to,uint256 validAfter)")
WITNESS_TYPE_STRING: public(constant(String[512])) = (
    "Witness witness)TokenPermissions(address token,uint256 amount)Witness(address to,uint256 validAfter)"
)


struct Witness:
    to: address
    validAfter: uint256  # seconds since 1970, inclusive


event Settled:
    pass


@deploy
def __init__():
    pass


@external
def settle(permit: permit2_payment.PermitTransferFrom, owner: address, witness: Witness, signature: Bytes[1024]):
    """
    @notice Pay the permitted amount from `owner` to the witness's payee.
    """
    digest: bytes32 = keccak256(abi_encode(WITNESS_TYPE, witness.to, witness.validAfter))
    permit2_payment._pay(
        permit, permit.permitted.amount, owner, witness.to, witness.validAfter, digest, WITNESS_TYPE_STRING, signature
    )
    log Settled()


@external
@view
def PERMIT2() -> address:
    """
    @notice Where signatures are checked and nonces kept; also whom a payer approves at the coin.
    """
    return permit2_payment.PERMIT2
