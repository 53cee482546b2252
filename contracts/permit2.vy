# pragma version 0.4.3
"""
@title Permit2, as far as payments need it
@license Apache-2.0
@notice Moves a payer's coins by the payer's signature, for any ERC-20 that the payer has approved once for this
        contract. It stands in a LocalChain's first block at the address that Permit2 has everywhere, with Permit2's
        interface, EIP-712 types and custom errors, so that x402 clients pay there as they pay elsewhere. On public
        chains the deployed Permit2 is used, and this code never is.

        What cannot happen: coins that move without their owner's signature over token, most amount, spender, nonce,
        deadline and witness; more than the signed amount; a signature that counts twice, or after its deadline, or for
        another spender than the caller, or on another chain.
@dev    Only what x402 calls is here: `permitWitnessTransferFrom` with unordered nonces, and their cancellation. Nonces
        are bits: the upper 248 bits of a nonce name a word, the lower 8 a bit in it. A nonce is used up before the
        token is called, so that a token which calls back finds nothing to take twice; hence no lock.
@custom:kill Nothing to stop: nobody has special rights. A payer stops every payment by approving 0 at the token, and
        single ones with `invalidateUnorderedNonces`.
"""

from ethereum.ercs import IERC20

from modules import typed_data

interface ERC1271:
    def isValidSignature(digest: bytes32, signature: Bytes[1024]) -> bytes4: view

DOMAIN_TYPE: constant(bytes32) = keccak256("EIP712Domain(string name,uint256 chainId,address verifyingContract)")
PERMISSIONS_TYPE: constant(bytes32) = keccak256("TokenPermissions(address token,uint256 amount)")
PERMIT_STUB: constant(String[101]) = "PermitWitnessTransferFrom(TokenPermissions permitted,address spender,uint256 nonce,uint256 deadline,"
MAGIC: constant(bytes4) = 0x1626ba7e  # what a contract answers that takes the signature for its own (EIP-1271)


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


nonceBitmap: public(HashMap[address, HashMap[uint256, uint256]])  # words of used nonces, by owner


event UnorderedNonceInvalidation:
    owner: indexed(address)
    word: uint256
    mask: uint256


@deploy
def __init__():
    pass


@external
def permitWitnessTransferFrom(
    permit: PermitTransferFrom,
    transferDetails: SignatureTransferDetails,
    owner: address,
    witness: bytes32,
    witnessTypeString: String[512],
    signature: Bytes[1024],
):
    """
    @notice Move `requestedAmount` of the permitted token from `owner`, who signed the permit for the caller.
    @param  witness the hash of what else the owner signed, whose EIP-712 type `witnessTypeString` says.
    """
    if block.timestamp > permit.deadline:
        raw_revert(abi_encode(permit.deadline, method_id=method_id("SignatureExpired(uint256)")))
    if transferDetails.requestedAmount > permit.permitted.amount:
        raw_revert(abi_encode(permit.permitted.amount, method_id=method_id("InvalidAmount(uint256)")))
    self._use(owner, permit.nonce)
    kind: bytes32 = keccak256(concat(PERMIT_STUB, witnessTypeString))
    permitted: bytes32 = keccak256(abi_encode(PERMISSIONS_TYPE, permit.permitted))
    fields: bytes32 = keccak256(abi_encode(kind, permitted, msg.sender, permit.nonce, permit.deadline, witness))
    self._check(owner, typed_data._digest(self._domain(), fields), signature)
    moved: bool = extcall IERC20(permit.permitted.token).transferFrom(
        owner, transferDetails.to, transferDetails.requestedAmount, default_return_value=True
    )
    assert moved, "permit2: transfer failed"


@external
def invalidateUnorderedNonces(wordPos: uint256, mask: uint256):
    """
    @notice Use up nonces of the caller's own: those whose bits are set in `mask`, in word `wordPos`.
    """
    self.nonceBitmap[msg.sender][wordPos] |= mask
    log UnorderedNonceInvalidation(owner=msg.sender, word=wordPos, mask=mask)


@external
@view
def DOMAIN_SEPARATOR() -> bytes32:
    """
    @notice The EIP-712 domain of this contract. It has no version.
    """
    return self._domain()


# --- inside -----------------------------------------------------------------------------------------------------------


@internal
def _use(owner: address, nonce: uint256):
    """
    @notice Use up a nonce, once.
    """
    bit: uint256 = 1 << (nonce & 255)
    word: uint256 = self.nonceBitmap[owner][nonce >> 8]
    if word & bit != 0:
        raw_revert(method_id("InvalidNonce()"))
    self.nonceBitmap[owner][nonce >> 8] = word | bit


@internal
@view
def _check(owner: address, digest: bytes32, signature: Bytes[1024]):
    """
    @notice Revert unless `signature` is the owner's. A contract says itself what it takes for its own.
    """
    if owner.is_contract:
        answer: bytes4 = staticcall ERC1271(owner).isValidSignature(digest, signature)
        if answer != MAGIC:
            raw_revert(method_id("InvalidContractSignature()"))
        return
    if len(signature) != 65:
        raw_revert(method_id("InvalidSignatureLength()"))
    signer: address = typed_data._signer_of(digest, slice(signature, 0, 65))
    if signer == empty(address):
        raw_revert(method_id("InvalidSignature()"))
    if signer != owner:
        raw_revert(method_id("InvalidSigner()"))


@internal
@view
def _domain() -> bytes32:
    return keccak256(abi_encode(DOMAIN_TYPE, keccak256("Permit2"), chain.id, self))
