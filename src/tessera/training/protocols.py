"""The names under which a run's members answer each other, and how long each may take."""

JOIN = "tessera/join/3"  # to the host: what is there to do, give me a seat
RUN = "tessera/run/3"  # to the host: roster, reports
RPC = "tessera/rpc/1"  # to the host: JSON-RPC of the run's chain
CONTROL = "tessera/control/1"  # from stage 0: which checkpoints, start a session
PIPELINE = "tessera/pipeline/2"  # a boundary link
EPOCH = "tessera/epoch/2"  # among workers: receipts, votes, leaves
MEMBERSHIP = "tessera/membership/1"  # among workers: signatures for who comes and goes, and whether one is there
STATE = "tessera/state/1"  # among the workers of a stage: its newest checkpoints

CALL_S = 10.0  # an answer that needs no work
WORK_S = 90.0  # an answer that loads a checkpoint or deploys a contract
SMALL = 64 * 1024  # bytes of an ordinary request or reply
