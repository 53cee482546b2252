# pragma version 0.4.3
"""
@title Test USD
@license Apache-2.0
@notice A stablecoin for tests, shaped like USDC: 6 decimals, and EIP-3009 payments by signature.

        THIS IS PLAY MONEY. Anyone may `mint` any amount, on purpose: it has no value and must never be given one.

        What cannot happen, minting aside: a balance that moves without its owner's call, allowance or signature; an
        authorization used twice, after its time, or after it was cancelled.
@dev    Reasons are worded as USDC words them, because x402 clients read them. The contract calls nobody, so it needs
        no lock against re-entry.
@custom:kill Nothing to stop: nobody has special rights.
"""

from ethereum.ercs import IERC20
from ethereum.ercs import IERC20Detailed

from modules import typed_data

implements: IERC20
implements: IERC20Detailed

TRANSFER_TYPE: constant(bytes32) = keccak256(
    "TransferWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
)
RECEIVE_TYPE: constant(bytes32) = keccak256(
    "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)"
)
CANCEL_TYPE: constant(bytes32) = keccak256("CancelAuthorization(address authorizer,bytes32 nonce)")

name: public(constant(String[8])) = "Test USD"
symbol: public(constant(String[4])) = "tUSD"
version: public(constant(String[1])) = "2"
decimals: public(constant(uint8)) = 6


struct Authorization:
    sender: address
    receiver: address
    amount: uint256
    valid_after: uint256  # seconds since 1970, exclusive
    valid_before: uint256  # seconds since 1970, exclusive
    nonce: bytes32


totalSupply: public(uint256)
balanceOf: public(HashMap[address, uint256])
allowance: public(HashMap[address, HashMap[address, uint256]])
authorizationState: public(HashMap[address, HashMap[bytes32, bool]])  # used or cancelled


event Transfer:
    sender: indexed(address)
    receiver: indexed(address)
    value: uint256

event Approval:
    owner: indexed(address)
    spender: indexed(address)
    value: uint256

event AuthorizationUsed:
    authorizer: indexed(address)
    nonce: indexed(bytes32)

event AuthorizationCanceled:
    authorizer: indexed(address)
    nonce: indexed(bytes32)


@deploy
def __init__():
    pass


@external
def mint(receiver: address, amount: uint256):
    """
    @notice Make play money out of nothing, for anyone.
    """
    assert receiver != empty(address), "coin: bad receiver"
    assert amount <= max_value(uint256) - self.totalSupply, "coin: supply exceeds 2**256"
    self.totalSupply += amount
    self.balanceOf[receiver] += amount
    log Transfer(sender=empty(address), receiver=receiver, value=amount)


@external
def transfer(receiver: address, amount: uint256) -> bool:
    """
    @notice Pay.
    """
    self._move(msg.sender, receiver, amount)
    return True


@external
def transferFrom(owner: address, receiver: address, amount: uint256) -> bool:
    """
    @notice Pay from an owner who has approved it.
    """
    allowed: uint256 = self.allowance[owner][msg.sender]
    if allowed != max_value(uint256):
        assert amount <= allowed, "coin: transfer amount exceeds allowance"
        self.allowance[owner][msg.sender] = allowed - amount
    self._move(owner, receiver, amount)
    return True


@external
def approve(spender: address, amount: uint256) -> bool:
    """
    @notice Let `spender` pay up to `amount` from the caller's balance; the maximum means no limit.
    """
    self.allowance[msg.sender][spender] = amount
    log Approval(owner=msg.sender, spender=spender, value=amount)
    return True


# --- EIP-3009 ---------------------------------------------------------------------------------------------------------


@external
def transferWithAuthorization(
    sender: address,
    receiver: address,
    amount: uint256,
    valid_after: uint256,
    valid_before: uint256,
    nonce: bytes32,
    v: uint8,
    r: bytes32,
    s: bytes32,
):
    """
    @notice Pay as `sender` has signed. Anyone may send it.
    """
    authorization: Authorization = Authorization(
        sender=sender, receiver=receiver, amount=amount, valid_after=valid_after, valid_before=valid_before, nonce=nonce
    )
    signer: address = self._signer(TRANSFER_TYPE, authorization, v, r, s)
    self._pay(authorization, signer)


@external
def receiveWithAuthorization(
    sender: address,
    receiver: address,
    amount: uint256,
    valid_after: uint256,
    valid_before: uint256,
    nonce: bytes32,
    v: uint8,
    r: bytes32,
    s: bytes32,
):
    """
    @notice The same, but only the payee may send it: nobody can run ahead of a contract that pulls a payment.
    """
    assert receiver == msg.sender, "coin: caller must be the payee"
    authorization: Authorization = Authorization(
        sender=sender, receiver=receiver, amount=amount, valid_after=valid_after, valid_before=valid_before, nonce=nonce
    )
    signer: address = self._signer(RECEIVE_TYPE, authorization, v, r, s)
    self._pay(authorization, signer)


@external
def cancelAuthorization(authorizer: address, nonce: bytes32, v: uint8, r: bytes32, s: bytes32):
    """
    @notice Make a nonce unusable, as `authorizer` has signed. Anyone may send it.
    """
    self._use(authorizer, nonce)
    digest: bytes32 = typed_data._digest(self._domain(), keccak256(abi_encode(CANCEL_TYPE, authorizer, nonce)))
    signer: address = typed_data._signer(digest, convert(v, uint256), convert(r, uint256), convert(s, uint256))
    assert authorizer != empty(address) and signer == authorizer, "coin: invalid signature"
    log AuthorizationCanceled(authorizer=authorizer, nonce=nonce)


@external
@view
def DOMAIN_SEPARATOR() -> bytes32:
    """
    @notice The EIP-712 domain of this contract.
    """
    return self._domain()


@external
def __default__():
    """
    @notice `transferWithAuthorization` with the signature as 65 bytes, the other form that USDC has.
    @dev    Vyper has no overloading, so the second selector is answered here and stands in no ABI.
    """
    selector: Bytes[4] = slice(msg.data, 0, 4)
    assert selector == method_id(
        "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,bytes)"
    ), "coin: unknown method"
    authorization: Authorization = empty(Authorization)
    signature: Bytes[65] = b""
    authorization.sender, authorization.receiver, authorization.amount, authorization.valid_after, authorization.valid_before, authorization.nonce, signature = abi_decode(
        slice(msg.data, 4, 352), (address, address, uint256, uint256, uint256, bytes32, Bytes[65])
    )
    signer: address = typed_data._signer_of(self._authorization_digest(TRANSFER_TYPE, authorization), signature)
    self._pay(authorization, signer)


# --- inside -----------------------------------------------------------------------------------------------------------


@internal
def _pay(authorization: Authorization, signer: address):
    assert block.timestamp > authorization.valid_after, "coin: authorization is not yet valid"
    assert block.timestamp < authorization.valid_before, "coin: authorization is expired"
    self._use(authorization.sender, authorization.nonce)
    assert authorization.sender != empty(address) and signer == authorization.sender, "coin: invalid signature"
    log AuthorizationUsed(authorizer=authorization.sender, nonce=authorization.nonce)
    self._move(authorization.sender, authorization.receiver, authorization.amount)


@internal
def _use(authorizer: address, nonce: bytes32):
    assert not self.authorizationState[authorizer][nonce], "coin: authorization is used or canceled"
    self.authorizationState[authorizer][nonce] = True


@internal
def _move(sender: address, receiver: address, amount: uint256):
    assert receiver != empty(address), "coin: bad receiver"
    assert amount <= self.balanceOf[sender], "coin: transfer amount exceeds balance"
    self.balanceOf[sender] -= amount
    self.balanceOf[receiver] += amount
    log Transfer(sender=sender, receiver=receiver, value=amount)


@internal
@view
def _signer(kind: bytes32, authorization: Authorization, v: uint8, r: bytes32, s: bytes32) -> address:
    digest: bytes32 = self._authorization_digest(kind, authorization)
    return typed_data._signer(digest, convert(v, uint256), convert(r, uint256), convert(s, uint256))


@internal
@view
def _authorization_digest(kind: bytes32, authorization: Authorization) -> bytes32:
    return typed_data._digest(
        self._domain(),
        keccak256(
            abi_encode(
                kind,
                authorization.sender,
                authorization.receiver,
                authorization.amount,
                authorization.valid_after,
                authorization.valid_before,
                authorization.nonce,
            )
        ),
    )


@internal
@view
def _domain() -> bytes32:
    return typed_data._domain(keccak256(name), keccak256(version))
