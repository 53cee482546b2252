"""The names under which a run's members answer each other, and how long each may take."""

JOIN = "tessera/join/2"  # to the host: what is there to do, give me a seat
RUN = "tessera/run/2"  # to the host: roster, reports
RPC = "tessera/rpc/1"  # to the host: JSON-RPC of the run's chain
CONTROL = "tessera/control/1"  # from stage 0: which checkpoints, start a session
PIPELINE = "tessera/pipeline/1"  # a boundary link
EPOCH = "tessera/epoch/1"  # among workers: receipts, votes, leaves
HANDOVER = "tessera/handover/1"  # a stage changes hands: its state, and the others' signatures
SNAPSHOT = "tessera/snapshot/1"  # to holders of other stages: a piece of a stage's state, to keep or to give back

CALL_S = 10.0  # an answer that needs no work
WORK_S = 90.0  # an answer that loads a checkpoint or deploys a contract
SMALL = 64 * 1024  # bytes of an ordinary request or reply
