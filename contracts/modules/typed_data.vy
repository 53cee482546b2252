# pragma version 0.4.3
"""
@title Typed data
@license Apache-2.0
@notice EIP-712 digests, and the account behind a signature.

        What cannot happen: a signature that counts on another chain or for another contract, because both are hashed
        into every digest; a second signature over the same digest by flipping `s`, because only the lower half passes.
@custom:kill Nothing to stop: the module has no state.
"""

DOMAIN_TYPE: constant(bytes32) = keccak256(
    "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
)
HALF_ORDER: constant(uint256) = 57896044618658097711785492504343953926418782139537452191302581570759080747168


@internal
@view
def _domain(name_hash: bytes32, version_hash: bytes32) -> bytes32:
    """
    @notice The separator of this contract on this chain. Computed each time, so that it is right after a chain split.
    """
    return keccak256(abi_encode(DOMAIN_TYPE, name_hash, version_hash, chain.id, self))


@internal
@pure
def _digest(domain: bytes32, struct_hash: bytes32) -> bytes32:
    """
    @notice What is signed.
    """
    return keccak256(concat(b"\x19\x01", domain, struct_hash))


@internal
@pure
def _signer(digest: bytes32, v: uint256, r: uint256, s: uint256) -> address:
    """
    @notice Who signed `digest`, or the zero address when the signature is malformed.
    """
    if v not in [27, 28] or s > HALF_ORDER:
        return empty(address)
    return ecrecover(digest, v, r, s)


@internal
@pure
def _signer_of(digest: bytes32, signature: Bytes[65]) -> address:
    """
    @notice The same for 65 bytes r, s, v.
    """
    if len(signature) != 65:
        return empty(address)
    r: uint256 = convert(extract32(signature, 0), uint256)
    s: uint256 = convert(extract32(signature, 32), uint256)
    v: uint256 = convert(slice(signature, 64, 1), uint256)
    return self._signer(digest, v, r, s)
