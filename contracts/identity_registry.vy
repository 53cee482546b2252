# pragma version 0.4.3
"""
@title Identity registry
@license Apache-2.0
@notice Who an agent is: the identity registry of ERC-8004 for chains where the deployed one is not, with its calls and
        events. An agent is an ERC-721 token; its URI names a file that says what the agent offers and where.

        The wallet is the account that the agent is paid at. It is the registrant's at first; another one must agree by
        an EIP-712 or ERC-1271 signature, and none outlives a change of owner. `was_wallet` remembers all of them.

        What cannot happen: an agent taken without its owner's call or approval; a wallet set that has not signed, or by
        a signature of another chain, contract, agent, owner or time; a new owner paid at the old owner's wallet.
@dev    The deployed registry's `Ownable` and upgrade calls are not here: nobody owns this one. The hook of a safe
        transfer and of `register` is called last, when everything is written, so that no lock is needed.
@custom:kill Nobody can stop the contract.
"""

from modules import typed_data


interface Receiver:
    def onERC721Received(operator: address, sender: address, id: uint256, data: Bytes[1_024]) -> bytes4: nonpayable


interface Wallet:
    def isValidSignature(digest: bytes32, signature: Bytes[1_024]) -> bytes4: view


WALLET_TYPE: constant(bytes32) = keccak256(
    "AgentWalletSet(uint256 agentId,address newWallet,address owner,uint256 deadline)"
)
DOMAIN_NAME: constant(String[23]) = "ERC8004IdentityRegistry"
DOMAIN_VERSION: constant(String[1]) = "1"
WALLET_KEY: constant(String[11]) = "agentWallet"
MAX_DELAY: constant(uint256) = 300  # seconds that a wallet's signature may wait
MAGIC: constant(bytes4) = 0x1626ba7e  # ERC-1271
RECEIVED: constant(bytes4) = 0x150b7a02  # ERC-721

name: public(constant(String[13])) = "AgentIdentity"
symbol: public(constant(String[5])) = "AGENT"


struct MetadataEntry:
    metadataKey: String[64]
    metadataValue: Bytes[1_024]


agent_count: public(uint256)  # ids begin at 0, as in the deployed registry
balances: HashMap[address, uint256]
owners: HashMap[uint256, address]
approved: HashMap[uint256, address]
isApprovedForAll: public(HashMap[address, HashMap[address, bool]])
uris: HashMap[uint256, String[2_048]]
wallets: HashMap[uint256, address]
was_wallet: public(HashMap[uint256, HashMap[address, bool]])  # by its own signature or registration, now or once
metadata: HashMap[uint256, HashMap[bytes32, Bytes[1_024]]]


event Transfer:
    sender: indexed(address)
    receiver: indexed(address)
    tokenId: indexed(uint256)

event Approval:
    owner: indexed(address)
    approved: indexed(address)
    tokenId: indexed(uint256)

event ApprovalForAll:
    owner: indexed(address)
    operator: indexed(address)
    approved: bool

event Registered:
    agentId: indexed(uint256)
    agentURI: String[2_048]
    owner: indexed(address)

event URIUpdated:
    agentId: indexed(uint256)
    newURI: String[2_048]
    updatedBy: indexed(address)

event MetadataSet:
    agentId: indexed(uint256)
    indexedMetadataKey: indexed(String[64])
    metadataKey: String[64]
    metadataValue: Bytes[1_024]


@deploy
def __init__():
    pass


# --- agents -----------------------------------------------------------------------------------------------------------


@external
def register(agentURI: String[2_048] = "", entries: DynArray[MetadataEntry, 16] = []) -> uint256:
    """
    @notice Become an agent: the caller is its owner and its first wallet.
    @return The agent's id.
    """
    id: uint256 = self.agent_count
    self.agent_count = id + 1
    self.owners[id] = msg.sender
    self.balances[msg.sender] += 1
    self.uris[id] = agentURI
    log Transfer(sender=empty(address), receiver=msg.sender, tokenId=id)
    log Registered(agentId=id, agentURI=agentURI, owner=msg.sender)
    self._set_wallet(id, msg.sender)
    for entry: MetadataEntry in entries:
        self._set_metadata(id, entry.metadataKey, entry.metadataValue)
    self._check_receiver(empty(address), msg.sender, id, b"")
    return id


@external
def setAgentURI(agentId: uint256, newURI: String[2_048]):
    """
    @notice Point to another description.
    """
    self._check_authorized(agentId)
    self.uris[agentId] = newURI
    log URIUpdated(agentId=agentId, newURI=newURI, updatedBy=msg.sender)


@external
def setMetadata(agentId: uint256, metadataKey: String[64], metadataValue: Bytes[1_024]):
    """
    @notice Say something about the agent on the chain itself. The key `agentWallet` is reserved.
    """
    self._check_authorized(agentId)
    self._set_metadata(agentId, metadataKey, metadataValue)


@external
def setAgentWallet(agentId: uint256, newWallet: address, deadline: uint256, signature: Bytes[1_024]):
    """
    @notice Be paid at another account, which has signed `wallet_digest`.
    @param deadline Until when the signature counts: five minutes from now at most.
    """
    self._check_authorized(agentId)
    assert newWallet != empty(address), "identity_registry: bad wallet"
    assert block.timestamp <= deadline, "identity_registry: signature expired"
    assert deadline <= block.timestamp + MAX_DELAY, "identity_registry: deadline too far"
    digest: bytes32 = self._wallet_digest(agentId, newWallet, deadline)
    assert self._has_signed(newWallet, digest, signature), "identity_registry: not the wallet's signature"
    self._set_wallet(agentId, newWallet)


@external
def unsetAgentWallet(agentId: uint256):
    """
    @notice Have no wallet.
    """
    self._check_authorized(agentId)
    self._clear_wallet(agentId)


@external
@view
def wallet_digest(agentId: uint256, newWallet: address, deadline: uint256) -> bytes32:
    """
    @notice The EIP-712 digest that a wallet signs to become an agent's.
    """
    return self._wallet_digest(agentId, newWallet, deadline)


@external
@view
def getAgentWallet(agentId: uint256) -> address:
    """
    @notice Where the agent is paid; empty for nowhere.
    """
    return self.wallets[agentId]


@external
@view
def getMetadata(agentId: uint256, metadataKey: String[64]) -> Bytes[1_024]:
    """
    @notice What was set under a key; empty for nothing.
    """
    if metadataKey != WALLET_KEY:
        return self.metadata[agentId][keccak256(metadataKey)]
    if self.wallets[agentId] == empty(address):
        return b""
    return self._wallet_bytes(self.wallets[agentId])


@external
@view
def isAuthorizedOrOwner(spender: address, agentId: uint256) -> bool:
    """
    @notice Whether `spender` is the owner, or may act for him.
    """
    return self._is_authorized(spender, agentId)


@external
@view
def eip712Domain() -> (bytes1, String[23], String[1], uint256, address, bytes32, DynArray[uint256, 1]):
    """
    @notice The signing domain, as ERC-5267 has it.
    """
    return (0x0f, DOMAIN_NAME, DOMAIN_VERSION, chain.id, self, empty(bytes32), [])


# --- ERC-721 ----------------------------------------------------------------------------------------------------------


@external
@view
def ownerOf(tokenId: uint256) -> address:
    """
    @notice Whose agent it is.
    """
    return self._owner(tokenId)


@external
@view
def balanceOf(owner: address) -> uint256:
    """
    @notice How many agents an account owns.
    """
    assert owner != empty(address), "identity_registry: nobody's balance"
    return self.balances[owner]


@external
@view
def tokenURI(tokenId: uint256) -> String[2_048]:
    """
    @notice Where the agent is described.
    """
    self._owner(tokenId)
    return self.uris[tokenId]


@external
@view
def getApproved(tokenId: uint256) -> address:
    """
    @notice Who may act for this one agent, beside its owner.
    """
    self._owner(tokenId)
    return self.approved[tokenId]


@external
@view
def supportsInterface(interfaceId: bytes4) -> bool:
    """
    @notice ERC-165, ERC-721 and its metadata.
    """
    return interfaceId in [0x01ffc9a7, 0x80ac58cd, 0x5b5e139f]


@external
def approve(receiver: address, tokenId: uint256):
    """
    @notice Let one account act for one agent.
    """
    owner: address = self._owner(tokenId)
    assert msg.sender == owner or self.isApprovedForAll[owner][msg.sender], "identity_registry: not authorized"
    self.approved[tokenId] = receiver
    log Approval(owner=owner, approved=receiver, tokenId=tokenId)


@external
def setApprovalForAll(operator: address, approved: bool):
    """
    @notice Let an account act for all agents of the caller, or no longer.
    """
    assert operator != empty(address), "identity_registry: bad operator"
    self.isApprovedForAll[msg.sender][operator] = approved
    log ApprovalForAll(owner=msg.sender, operator=operator, approved=approved)


@external
def transferFrom(sender: address, receiver: address, tokenId: uint256):
    """
    @notice Hand an agent over. Its wallet is cleared.
    """
    self._transfer(sender, receiver, tokenId)


@external
def safeTransferFrom(sender: address, receiver: address, tokenId: uint256, data: Bytes[1_024] = b""):
    """
    @notice The same, and a contract must say that it can hold an agent.
    """
    self._transfer(sender, receiver, tokenId)
    self._check_receiver(sender, receiver, tokenId, data)


# --- inside -----------------------------------------------------------------------------------------------------------


@internal
@view
def _owner(id: uint256) -> address:
    owner: address = self.owners[id]
    assert owner != empty(address), "identity_registry: no such agent"
    return owner


@internal
@view
def _is_authorized(who: address, id: uint256) -> bool:
    owner: address = self._owner(id)
    return who == owner or self.isApprovedForAll[owner][who] or who == self.approved[id]


@internal
@view
def _check_authorized(id: uint256):
    assert self._is_authorized(msg.sender, id), "identity_registry: not authorized"


@internal
def _transfer(sender: address, receiver: address, id: uint256):
    self._check_authorized(id)
    assert sender == self.owners[id], "identity_registry: not the owner"
    assert receiver != empty(address), "identity_registry: bad receiver"
    self._clear_wallet(id)
    self.approved[id] = empty(address)
    self.balances[sender] -= 1
    self.balances[receiver] += 1
    self.owners[id] = receiver
    log Transfer(sender=sender, receiver=receiver, tokenId=id)


@internal
def _set_wallet(id: uint256, wallet: address):
    self.wallets[id] = wallet
    self.was_wallet[id][wallet] = True
    log MetadataSet(
        agentId=id, indexedMetadataKey=WALLET_KEY, metadataKey=WALLET_KEY, metadataValue=self._wallet_bytes(wallet)
    )


@internal
def _clear_wallet(id: uint256):
    self.wallets[id] = empty(address)
    log MetadataSet(agentId=id, indexedMetadataKey=WALLET_KEY, metadataKey=WALLET_KEY, metadataValue=b"")


@internal
def _set_metadata(id: uint256, metadata_key: String[64], metadata_value: Bytes[1_024]):
    assert metadata_key != WALLET_KEY, "identity_registry: reserved key"
    self.metadata[id][keccak256(metadata_key)] = metadata_value
    log MetadataSet(
        agentId=id, indexedMetadataKey=metadata_key, metadataKey=metadata_key, metadataValue=metadata_value
    )


@internal
@pure
def _wallet_bytes(wallet: address) -> Bytes[20]:
    return slice(convert(wallet, bytes32), 12, 20)


@internal
@view
def _wallet_digest(id: uint256, wallet: address, deadline: uint256) -> bytes32:
    return typed_data._digest(
        typed_data._domain(keccak256(DOMAIN_NAME), keccak256(DOMAIN_VERSION)),
        keccak256(abi_encode(WALLET_TYPE, id, wallet, self._owner(id), deadline)),
    )


@internal
@view
def _has_signed(wallet: address, digest: bytes32, signature: Bytes[1_024]) -> bool:
    if len(signature) == 65:
        short: Bytes[65] = slice(signature, 0, 65)
        if typed_data._signer_of(digest, short) == wallet:
            return True
    return wallet.is_contract and staticcall Wallet(wallet).isValidSignature(digest, signature) == MAGIC


@internal
def _check_receiver(sender: address, receiver: address, id: uint256, data: Bytes[1_024]):
    if receiver.is_contract:
        answer: bytes4 = extcall Receiver(receiver).onERC721Received(msg.sender, sender, id, data)
        assert answer == RECEIVED, "identity_registry: receiver refused"
