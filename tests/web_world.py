"""A run that never was, for tests of the page and the terminal view: any moment of it, with numbers that add up."""

from __future__ import annotations

import math

from tessera.core.ids import account_from_bytes
from tessera.devnet.snapshot import (
    Boundary,
    Epoch,
    Event,
    Income,
    LossPoint,
    Model,
    Owner,
    Payment,
    Peer,
    Phase,
    Snapshot,
    Urls,
)

__all__ = ["STEPS", "account", "moment", "peer_id", "transaction"]

STEPS = 600
TOKENS_PER_STEP = 4_096
START = 1_795_000_000.0
SHARE = 10**18
UNIGRAM, BIGRAM = 5.31, 3.62
ROLES = ("data", "creator")
SAMPLE = """):
    \"\"\"Return the absolute path of a file.\"\"\"
    path = os.fspath(path)
    if not isabs(path):
        cwd = os.getcwd()
        path = join(cwd, path)
    return normpath(path)
"""


def account(number: int) -> str:
    return account_from_bytes(bytes([17 + number]) * 20)


def peer_id(number: int) -> str:
    return bytes([(37 * number + 11) % 256, 161, 7 + number] * 11)[:32].hex()


def transaction(number: int) -> str:
    return "0x" + bytes([(53 * number + 5) % 256, 201, number % 256, 90] * 8).hex()


def loss(step: int) -> float:
    return 2.1 + 4.83 * math.exp(-step / 70) + 0.6 * math.exp(-step / 400) - 0.6 * math.exp(-1.5)


def losses(step: int) -> list[LossPoint]:
    return [
        LossPoint(
            at, at * TOKENS_PER_STEP, loss(at) + 0.08 * math.sin(at * 2.399),
            loss(at) + 0.05 if at % 60 == 0 else None,
        )
        for at in range(step + 1)
    ]  # fmt: skip


def moment(
    step: int, *, phase: Phase = "training", payments: int = 0, claimed: bool = False, stages: int = 4
) -> Snapshot:
    """The run after `step` steps and `payments` paid requests; `claimed` when everybody took his income."""
    epochs = step * 4 // STEPS
    work = epochs * 150 * TOKENS_PER_STEP
    shares = work * SHARE // 1_000
    each_owner = shares * stages // 16
    total = shares * stages + 2 * each_owner
    revenue = payments * 10_000
    spread = revenue - revenue % 7
    taken = [spread * shares // total if total and claimed else 0 for _ in range(stages)]
    taken_owners = [spread * each_owner // total if total and claimed else 0 for _ in ROLES]
    claimed_units = sum(taken) + sum(taken_owners)
    undistributed = revenue - spread
    dust = spread - claimed_units if claimed else min(3, spread)
    return Snapshot(
        run_id="3f" * 32,
        chain_id=8_402,
        phase=phase,
        phase_note="four stages, one after the other" if phase == "training" else "",
        model=Model(params=3_145_728, stages=stages, vocab=1_024, width=256, codec="codec, int8", name="tessera-py"),
        step=step,
        steps=STEPS,
        tokens=step * TOKENS_PER_STEP,
        tokens_per_s=14_210.0 + step % 97 if phase == "training" else None,
        losses=losses(step) if step else (),
        unigram_loss=UNIGRAM,
        bigram_loss=BIGRAM,
        wire_bytes_per_token=33.6 if step else None,
        dense_bytes_per_token=1_024.0,
        boundaries=[Boundary(i, 33.1 + i / 2, step * TOKENS_PER_STEP * 67) for i in range(stages - 1)],
        peers=[
            Peer(
                peer_id(i), account(i), i, "worker", "up", work, shares, 0 if claimed else 100 * payments, taken[i],
                0.4 + i / 10, transaction(40 + i) if claimed else "",
            )
            for i in range(stages)
        ],
        owners=[
            Owner(account(20 + i), role, each_owner, taken_owners[i], 0, transaction(60 + i) if claimed else "")
            for i, role in enumerate(ROLES)
        ],
        epochs=[
            Epoch(i, "0x" + bytes([i + 1] * 32).hex(), total // epochs, transaction(i), [peer_id(p) for p in range(4)])
            for i in range(epochs)
        ],
        income=Income(
            revenue, claimed_units, revenue - claimed_units - undistributed - dust, undistributed, dust, payments,
            contract=account(99),
        ),
        payments=[Payment(transaction(100 + i), account(30), 10_000, START + 200 + i) for i in range(payments)],
        sample=SAMPLE if payments else "",
        sample_prompt="def abspath(path" if payments else "",
        events=[
            Event(START, "the chain started, chain id 8402"),
            Event(START + 2, "4 workers took their seats"),
            *(
                Event(START + 40 * (i + 1), f"epoch {i} posted: {total // epochs // SHARE:,} shares", transaction(i))
                for i in range(epochs)
            ),
        ],
        urls=Urls("http://127.0.0.1:8402/v1", "http://127.0.0.1:8402/", "http://127.0.0.1:8403"),
        total_shares=total,
    )  # fmt: skip
