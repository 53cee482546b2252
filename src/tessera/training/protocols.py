"""The names under which a run's members answer each other, and how long each may take."""

JOIN = "tessera/join/4"  # to the host: what is there to do, here is my stake, give me a seat
RUN = "tessera/run/4"  # to the host: roster, reports
RPC = "tessera/rpc/1"  # to the host: JSON-RPC of the run's chain
CONTROL = "tessera/control/2"  # from the lead to each worker: who serves what, when a step ends
STATE = "tessera/state/1"  # among the workers of a stage: parameters and optimiser, for one who joins
PIPELINE = "tessera/pipeline/2"  # a boundary link
AVERAGE = "tessera/average/1"  # among replicas of a stage: parts of gradients and of the state
EPOCH = "tessera/epoch/4"  # among workers: receipts and verdicts, votes, strikes, slashes, leaves
MEMBERSHIP = "tessera/membership/2"  # among workers: signatures for who comes and goes, and whether one is there
SNAPSHOT = "tessera/snapshot/1"  # to holders of other stages: a piece of a stage's state, to keep or to give back

CALL_S = 10.0  # an answer that needs no work
QUIET_S = 120.0  # how long a neighbour who owes something may be silent
WORK_S = 90.0  # an answer that loads a checkpoint or deploys a contract
SMALL = 64 * 1024  # bytes of an ordinary request or reply
