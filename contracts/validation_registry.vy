# pragma version 0.4.3
"""
@title Validation registry
@license Apache-2.0
@notice What validators say of an agent's work: the validation registry of ERC-8004, with its calls and events. An
        agent's owner asks a validator by name; that validator answers with 0 to 100, again whenever he knows more.

        What cannot happen: an answer by anybody but the validator asked; a request in the name of another's agent; a
        request asked twice, or moved to another validator or agent.
@dev    Lists return their newest 1,024, so that nobody can make a list unreadable by lengthening it.
@custom:kill Nobody can stop the contract.
"""


interface Identity:
    def isAuthorizedOrOwner(spender: address, agentId: uint256) -> bool: view


MAX_LIST: constant(uint256) = 1_024

getIdentityRegistry: public(immutable(address))


struct Request:
    validator: address
    agent: uint256
    response: uint8
    answered: bool
    response_hash: bytes32
    tag: String[64]
    updated: uint256


requests: HashMap[bytes32, Request]
agent_count: public(HashMap[uint256, uint256])
by_agent: public(HashMap[uint256, HashMap[uint256, bytes32]])  # agent, position
validator_count: public(HashMap[address, uint256])
by_validator: public(HashMap[address, HashMap[uint256, bytes32]])


event ValidationRequest:
    validatorAddress: indexed(address)
    agentId: indexed(uint256)
    requestURI: String[2_048]
    requestHash: indexed(bytes32)

event ValidationResponse:
    validatorAddress: indexed(address)
    agentId: indexed(uint256)
    requestHash: indexed(bytes32)
    response: uint8
    responseURI: String[2_048]
    responseHash: bytes32
    tag: String[64]


@deploy
def __init__(identity_: address):
    """
    @param identity_ The identity registry.
    """
    assert identity_.is_contract, "validation_registry: identity is no contract"
    getIdentityRegistry = identity_


@external
def validationRequest(validatorAddress: address, agentId: uint256, requestURI: String[2_048], requestHash: bytes32):
    """
    @notice The agent's owner, or who may act for him, asks a validator.
    @param requestHash Names the request: the hash of what is to be validated.
    """
    assert validatorAddress != empty(address), "validation_registry: bad validator"
    assert self.requests[requestHash].validator == empty(address), "validation_registry: asked already"
    authorized: bool = staticcall Identity(getIdentityRegistry).isAuthorizedOrOwner(msg.sender, agentId)
    assert authorized, "validation_registry: not authorized"
    self.requests[requestHash].validator = validatorAddress
    self.requests[requestHash].agent = agentId
    self.requests[requestHash].updated = block.timestamp
    self.by_agent[agentId][self.agent_count[agentId]] = requestHash
    self.agent_count[agentId] += 1
    self.by_validator[validatorAddress][self.validator_count[validatorAddress]] = requestHash
    self.validator_count[validatorAddress] += 1
    log ValidationRequest(
        validatorAddress=validatorAddress, agentId=agentId, requestURI=requestURI, requestHash=requestHash
    )


@external
def validationResponse(
    requestHash: bytes32, response: uint8, responseURI: String[2_048], responseHash: bytes32, tag: String[64]
):
    """
    @notice The validator answers, or answers again.
    @param response 0 (failed) to 100 (passed).
    """
    request: Request = self._request(requestHash)
    assert msg.sender == request.validator, "validation_registry: not the validator"
    assert response <= 100, "validation_registry: more than 100"
    request.response = response
    request.answered = True
    request.response_hash = responseHash
    request.tag = tag
    request.updated = block.timestamp
    self.requests[requestHash] = request
    log ValidationResponse(
        validatorAddress=msg.sender, agentId=request.agent, requestHash=requestHash, response=response,
        responseURI=responseURI, responseHash=responseHash, tag=tag,
    )


@external
@view
def getValidationStatus(requestHash: bytes32) -> (address, uint256, uint8, bytes32, String[64], uint256):
    """
    @notice Validator, agent, last answer, its hash and tag, and when the request last changed.
    """
    request: Request = self._request(requestHash)
    return (request.validator, request.agent, request.response, request.response_hash, request.tag, request.updated)


@external
@view
def getSummary(agentId: uint256, validatorAddresses: DynArray[address, 64], tag: String[64]) -> (uint64, uint8):
    """
    @notice How many answers there are, and their mean, rounded down.
    @param validatorAddresses Whose answers count; empty for all.
    @param tag Which answers count; empty for all.
    """
    count: uint256 = 0
    total: uint256 = 0
    hashes: DynArray[bytes32, MAX_LIST] = self._of_agent(agentId)
    for requestHash: bytes32 in hashes:
        request: Request = self.requests[requestHash]
        if not request.answered or (tag != "" and request.tag != tag):
            continue
        if len(validatorAddresses) == 0 or request.validator in validatorAddresses:
            count += 1
            total += convert(request.response, uint256)
    if count == 0:
        return (0, 0)
    return (convert(count, uint64), convert(total // count, uint8))


@external
@view
def getAgentValidations(agentId: uint256) -> DynArray[bytes32, MAX_LIST]:
    """
    @notice The newest requests for an agent.
    """
    return self._of_agent(agentId)


@external
@view
def getValidatorRequests(validatorAddress: address) -> DynArray[bytes32, MAX_LIST]:
    """
    @notice The newest requests to a validator.
    """
    found: DynArray[bytes32, MAX_LIST] = []
    count: uint256 = self.validator_count[validatorAddress]
    for i: uint256 in range(count - min(count, MAX_LIST), count, bound=MAX_LIST):
        found.append(self.by_validator[validatorAddress][i])
    return found


@internal
@view
def _of_agent(agent: uint256) -> DynArray[bytes32, MAX_LIST]:
    found: DynArray[bytes32, MAX_LIST] = []
    count: uint256 = self.agent_count[agent]
    for i: uint256 in range(count - min(count, MAX_LIST), count, bound=MAX_LIST):
        found.append(self.by_agent[agent][i])
    return found


@internal
@view
def _request(request_hash: bytes32) -> Request:
    request: Request = self.requests[request_hash]
    assert request.validator != empty(address), "validation_registry: no such request"
    return request
