# pragma version 0.4.3
"""
@title Reputation registry
@license Apache-2.0
@notice What clients say of agents: the reputation registry of ERC-8004, with its calls and events, and one rule more.

        Feedback needs a completed job: one in `escrow` that the sender has paid for, as its client, and that the agent
        has done: its provider is the agent's owner, its wallet, or was its wallet once, so that no agent escapes by
        changing it. The proof travels in `endpoint`, which names where the service was rendered: "job:17". Each job
        votes once, for good: a revoked vote does not come back.

        What cannot happen: feedback without a completed job, twice for one job, by anybody but the job's client, or for
        an agent that has not done it; feedback by an agent's owner, operator or wallet for itself.

        What can: somebody pays himself for jobs by accounts of his own. That is why `getSummary` demands a list of
        clients and has no default: a ring's votes count for whoever trusts the ring, and for nobody else.
@dev    A plain payment in a coin is no proof: a contract cannot read who was paid how much. An authorization's state
        says that a nonce was used or cancelled, and its payer can sign another authorization of the same nonce.
@custom:kill Nobody can stop the contract.
"""


struct Job:
    client: address
    provider: address
    evaluator: address
    hook: address
    budget: uint256
    bond: uint256
    expiredAt: uint256
    on_silence: uint256
    status: uint256
    bonded: bool


interface Escrow:
    def jobs(jobId: uint256) -> Job: view


interface Identity:
    def isAuthorizedOrOwner(spender: address, agentId: uint256) -> bool: view
    def ownerOf(agentId: uint256) -> address: view
    def was_wallet(agentId: uint256, account: address) -> bool: view


COMPLETED: constant(uint256) = 3  # of a job
MAX_VALUE: constant(int128) = 10**38
MAX_LIST: constant(uint256) = 1_024
MAX_CLIENTS: constant(uint256) = 64
MAX_READ: constant(uint256) = 64
PREFIX: constant(Bytes[4]) = b"job:"

getIdentityRegistry: public(immutable(address))
escrow: public(immutable(address))


struct Feedback:
    value: int128
    decimals: uint8
    revoked: bool
    tag1: String[64]
    tag2: String[64]


job_voted: public(HashMap[uint256, bool])
feedback: HashMap[uint256, HashMap[address, HashMap[uint64, Feedback]]]  # agent, client, index from 1
getLastIndex: public(HashMap[uint256, HashMap[address, uint64]])
client_count: public(HashMap[uint256, uint256])
client_at: public(HashMap[uint256, HashMap[uint256, address]])  # agent, position
responses: HashMap[uint256, HashMap[address, HashMap[uint64, HashMap[address, uint64]]]]
all_responses: HashMap[uint256, HashMap[address, HashMap[uint64, uint64]]]


event NewFeedback:
    agentId: indexed(uint256)
    clientAddress: indexed(address)
    feedbackIndex: uint64
    value: int128
    valueDecimals: uint8
    indexedTag1: indexed(String[64])
    tag1: String[64]
    tag2: String[64]
    endpoint: String[256]
    feedbackURI: String[2_048]
    feedbackHash: bytes32

event FeedbackRevoked:
    agentId: indexed(uint256)
    clientAddress: indexed(address)
    feedbackIndex: indexed(uint64)

event ResponseAppended:
    agentId: indexed(uint256)
    clientAddress: indexed(address)
    feedbackIndex: uint64
    responder: indexed(address)
    responseURI: String[2_048]
    responseHash: bytes32


@deploy
def __init__(identity_: address, escrow_: address):
    """
    @param identity_ The identity registry.
    @param escrow_ The job escrow whose completed jobs may vote.
    """
    assert identity_.is_contract, "reputation_registry: identity is no contract"
    assert escrow_.is_contract, "reputation_registry: escrow is no contract"
    getIdentityRegistry = identity_
    escrow = escrow_


@external
def giveFeedback(
    agentId: uint256,
    score: int128,
    valueDecimals: uint8,
    tag1: String[64],
    tag2: String[64],
    endpoint: String[256],
    feedbackURI: String[2_048],
    feedbackHash: bytes32,
):
    """
    @notice The client of a completed job says how the agent did it.
    @param score With `valueDecimals` digits behind the point.
    @param endpoint The job: "job:" and its number in `escrow`.
    """
    assert valueDecimals <= 18, "reputation_registry: too many decimals"
    assert -MAX_VALUE <= score and score <= MAX_VALUE, "reputation_registry: value too large"
    self._check_not_self(agentId)
    self._use_job(self._job_of(endpoint), agentId)
    index: uint64 = self.getLastIndex[agentId][msg.sender] + 1
    if index == 1:
        self.client_at[agentId][self.client_count[agentId]] = msg.sender
        self.client_count[agentId] += 1
    self.getLastIndex[agentId][msg.sender] = index
    self.feedback[agentId][msg.sender][index] = Feedback(
        value=score, decimals=valueDecimals, revoked=False, tag1=tag1, tag2=tag2
    )
    log NewFeedback(
        agentId=agentId, clientAddress=msg.sender, feedbackIndex=index, value=score, valueDecimals=valueDecimals,
        indexedTag1=tag1, tag1=tag1, tag2=tag2, endpoint=endpoint, feedbackURI=feedbackURI, feedbackHash=feedbackHash,
    )


@external
def revokeFeedback(agentId: uint256, feedbackIndex: uint64):
    """
    @notice Take one's own word back. Its job does not vote again.
    """
    self._check_index(agentId, msg.sender, feedbackIndex)
    assert not self.feedback[agentId][msg.sender][feedbackIndex].revoked, "reputation_registry: revoked already"
    self.feedback[agentId][msg.sender][feedbackIndex].revoked = True
    log FeedbackRevoked(agentId=agentId, clientAddress=msg.sender, feedbackIndex=feedbackIndex)


@external
def appendResponse(
    agentId: uint256, clientAddress: address, feedbackIndex: uint64, responseURI: String[2_048], responseHash: bytes32
):
    """
    @notice Anyone answers to a feedback: the agent with a refund, an observer with a doubt.
    """
    assert responseURI != "", "reputation_registry: empty response"
    self._check_index(agentId, clientAddress, feedbackIndex)
    self.responses[agentId][clientAddress][feedbackIndex][msg.sender] += 1
    self.all_responses[agentId][clientAddress][feedbackIndex] += 1
    log ResponseAppended(
        agentId=agentId, clientAddress=clientAddress, feedbackIndex=feedbackIndex, responder=msg.sender,
        responseURI=responseURI, responseHash=responseHash,
    )


@external
@view
def readFeedback(agentId: uint256, clientAddress: address, feedbackIndex: uint64) -> (
    int128, uint8, String[64], String[64], bool
):
    """
    @notice Value, decimals, both tags, and whether it is revoked.
    """
    self._check_index(agentId, clientAddress, feedbackIndex)
    said: Feedback = self.feedback[agentId][clientAddress][feedbackIndex]
    return (said.value, said.decimals, said.tag1, said.tag2, said.revoked)


@external
@view
def getSummary(
    agentId: uint256, clientAddresses: DynArray[address, MAX_CLIENTS], tag1: String[64], tag2: String[64]
) -> (uint64, int128, uint8):
    """
    @notice How many words of these clients count, their mean towards zero, and its decimals: the most frequent ones.
    @param clientAddresses Whom the reader trusts; nobody is not everybody.
    @param tag1 Which words count; empty for all. So `tag2`.
    """
    assert len(clientAddresses) > 0, "reputation_registry: clients required"
    count: int256 = 0
    total: int256 = 0
    uses: uint256[19] = empty(uint256[19])
    for client: address in clientAddresses:
        for index: uint64 in range(1, self.getLastIndex[agentId][client] + 1, bound=1_024):
            said: Feedback = self.feedback[agentId][client][index]
            if self._counts(said, tag1, tag2, False):
                count += 1
                total += convert(said.value, int256) * self._power(18 - said.decimals)
                uses[said.decimals] += 1
    if count == 0:
        return (0, 0, 0)
    decimals: uint8 = self._most_used(uses)
    return (convert(count, uint64), convert(total // count // self._power(18 - decimals), int128), decimals)


@external
@view
def readAllFeedback(
    agentId: uint256,
    clientAddresses: DynArray[address, MAX_CLIENTS],
    tag1: String[64],
    tag2: String[64],
    includeRevoked: bool,
) -> (
    DynArray[address, MAX_READ],
    DynArray[uint64, MAX_READ],
    DynArray[int128, MAX_READ],
    DynArray[uint8, MAX_READ],
    DynArray[String[64], MAX_READ],
    DynArray[String[64], MAX_READ],
    DynArray[bool, MAX_READ],
):
    """
    @notice Clients, indexes, values, decimals, tags and whether they are revoked, of up to 64 words.
    @param clientAddresses Whose; empty for the first 64 clients.
    """
    clients: DynArray[address, MAX_CLIENTS] = clientAddresses
    if len(clients) == 0:
        for i: uint256 in range(min(self.client_count[agentId], MAX_CLIENTS), bound=MAX_CLIENTS):
            clients.append(self.client_at[agentId][i])
    who: DynArray[address, MAX_READ] = []
    indexes: DynArray[uint64, MAX_READ] = []
    values: DynArray[int128, MAX_READ] = []
    decimals: DynArray[uint8, MAX_READ] = []
    tags1: DynArray[String[64], MAX_READ] = []
    tags2: DynArray[String[64], MAX_READ] = []
    revoked: DynArray[bool, MAX_READ] = []
    for client: address in clients:
        for index: uint64 in range(1, self.getLastIndex[agentId][client] + 1, bound=1_024):
            said: Feedback = self.feedback[agentId][client][index]
            if self._counts(said, tag1, tag2, includeRevoked):
                assert len(who) < MAX_READ, "reputation_registry: too many, name fewer clients"
                who.append(client)
                indexes.append(index)
                values.append(said.value)
                decimals.append(said.decimals)
                tags1.append(said.tag1)
                tags2.append(said.tag2)
                revoked.append(said.revoked)
    return (who, indexes, values, decimals, tags1, tags2, revoked)


@external
@view
def getResponseCount(
    agentId: uint256, clientAddress: address, feedbackIndex: uint64, responders: DynArray[address, 64]
) -> uint64:
    """
    @notice How many answers there are to a feedback; with index 0, to all of a client; without a client, to all.
    @param responders Whose; empty for anybody's.
    """
    if clientAddress != empty(address):
        return self._responses_to(agentId, clientAddress, feedbackIndex, responders)
    count: uint64 = 0
    for i: uint256 in range(self.client_count[agentId], bound=MAX_LIST):
        count += self._responses_to(agentId, self.client_at[agentId][i], 0, responders)
    return count


@external
@view
def getClients(agentId: uint256) -> DynArray[address, MAX_LIST]:
    """
    @notice Who has said something of an agent: the newest 1,024; `client_at` has all.
    """
    found: DynArray[address, MAX_LIST] = []
    count: uint256 = self.client_count[agentId]
    for i: uint256 in range(count - min(count, MAX_LIST), count, bound=MAX_LIST):
        found.append(self.client_at[agentId][i])
    return found


# --- inside -----------------------------------------------------------------------------------------------------------


@internal
@view
def _check_not_self(agent: uint256):
    interested: bool = staticcall Identity(getIdentityRegistry).isAuthorizedOrOwner(msg.sender, agent)
    if not interested:
        interested = staticcall Identity(getIdentityRegistry).was_wallet(agent, msg.sender)
    assert not interested, "reputation_registry: self-feedback"


@internal
def _use_job(id: uint256, agent: uint256):
    job: Job = staticcall Escrow(escrow).jobs(id)
    assert job.status == COMPLETED, "reputation_registry: job not completed"
    assert job.client == msg.sender, "reputation_registry: not the job's client"
    done: bool = staticcall Identity(getIdentityRegistry).was_wallet(agent, job.provider)
    if not done:
        done = staticcall Identity(getIdentityRegistry).ownerOf(agent) == job.provider
    assert done, "reputation_registry: not the agent's job"
    assert not self.job_voted[id], "reputation_registry: job has voted"
    self.job_voted[id] = True


@internal
@pure
def _job_of(endpoint: String[256]) -> uint256:
    """
    @dev "job:" and 1 to 20 digits.
    """
    text: Bytes[256] = convert(endpoint, Bytes[256])
    assert 4 < len(text) and len(text) <= 24, "reputation_registry: no job in endpoint"
    assert slice(text, 0, 4) == PREFIX, "reputation_registry: no job in endpoint"
    id: uint256 = 0
    for i: uint256 in range(4, len(text), bound=20):
        digit: uint256 = convert(slice(text, i, 1), uint256)
        assert 48 <= digit and digit <= 57, "reputation_registry: no job in endpoint"
        id = 10 * id + digit - 48
    return id


@internal
@view
def _check_index(agent: uint256, client: address, index: uint64):
    assert index > 0 and index <= self.getLastIndex[agent][client], "reputation_registry: no such feedback"


@internal
@pure
def _counts(said: Feedback, tag1: String[64], tag2: String[64], revoked_too: bool) -> bool:
    if said.revoked and not revoked_too:
        return False
    return (tag1 == "" or said.tag1 == tag1) and (tag2 == "" or said.tag2 == tag2)


@internal
@pure
def _most_used(uses: uint256[19]) -> uint8:
    best: uint256 = 0
    for i: uint256 in range(19):
        if uses[i] > uses[best]:
            best = i
    return convert(best, uint8)


@internal
@pure
def _power(exponent: uint8) -> int256:
    return convert(10 ** convert(exponent, uint256), int256)


@internal
@view
def _responses_to(agent: uint256, client: address, index: uint64, responders: DynArray[address, 64]) -> uint64:
    first: uint64 = max(index, 1)
    last: uint64 = index
    if index == 0:
        last = self.getLastIndex[agent][client]
    count: uint64 = 0
    for i: uint64 in range(first, max(first, last + 1), bound=1_024):
        if len(responders) == 0:
            count += self.all_responses[agent][client][i]
        for responder: address in responders:
            count += self.responses[agent][client][i][responder]
    return count
