# pragma version 0.4.3
"""
@title A payment through Permit2
@license Apache-2.0
@notice What x402's two proxies share: the checks before a payment, and the payment.

        What cannot happen: a payment of nothing, which would use up a nonce; a payment to or from nobody, or before the
        time that the payer signed.
@custom:kill Nothing to stop: the module has no state.
"""

interface Permit2:
    def permitWitnessTransferFrom(
        permit: PermitTransferFrom,
        transferDetails: SignatureTransferDetails,
        owner: address,
        witness: bytes32,
        witnessTypeString: String[512],
        signature: Bytes[1024],
    ): nonpayable

PERMIT2: constant(address) = 0x000000000022D473030F116dDEE9F6B43aC78BA3


struct TokenPermissions:
    token: address
    amount: uint256  # at most


struct PermitTransferFrom:
    permitted: TokenPermissions
    nonce: uint256
    deadline: uint256  # seconds since 1970, inclusive


struct SignatureTransferDetails:
    to: address
    requestedAmount: uint256


@internal
def _pay(
    permit: PermitTransferFrom,
    amount: uint256,
    owner: address,
    receiver: address,
    valid_after: uint256,
    witness: bytes32,
    witness_type: String[512],
    signature: Bytes[1024],
):
    """
    @notice Pay `amount` from `owner` to `receiver`, whom the witness names.
    """
    if amount == 0:
        raw_revert(method_id("InvalidAmount()"))
    if owner == empty(address):
        raw_revert(method_id("InvalidOwner()"))
    if receiver == empty(address):
        raw_revert(method_id("InvalidDestination()"))
    if block.timestamp < valid_after:
        raw_revert(method_id("PaymentTooEarly()"))
    details: SignatureTransferDetails = SignatureTransferDetails(to=receiver, requestedAmount=amount)
    extcall Permit2(PERMIT2).permitWitnessTransferFrom(permit, details, owner, witness, witness_type, signature)
