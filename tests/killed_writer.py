"""Kills a process that writes a LocalChain, again and again, and looks at what is left. Run by `test_chain_killed.py`.

    python killed_writer.py JOURNAL KILLS SEED

A child writes transactions as fast as it can and reports each block once the chain has told it of it. It is killed with
SIGKILL after a random time, while it opens the journal, writes a block, or writes a checkpoint; the next child opens
what the last one left and first reports every block that it finds. Children are forked from here, which has everything
imported: a start takes milliseconds. Ends with 1 and says what was wrong, or prints figures as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tessera.chain.local as local_module
from chain_support import CHAIN_ID, key
from tessera.chain.local import LocalChain
from tessera.chain.transactions import Transaction, sign

PAYER = key("payer")
WEI = 10**18
CHECKPOINT_EVERY, CHECKPOINT_LEAST = 24, 8  # often, so that kills fall into them


def opened(path: Path) -> LocalChain:
    return LocalChain(path, chain_id=CHAIN_ID, alloc={PAYER.account: WEI})


def write(path: Path, pipe: int) -> None:
    """The child's life."""
    chain = opened(path)
    found = "".join(f"{n} {chain.block(n).hash.hex()}\n" for n in range(chain.head.number + 1))  # type: ignore[union-attr]
    os.write(pipe, f"{found}open {chain.head.number}\n".encode())
    nonce = chain.state().nonce(bytes.fromhex(PAYER.account[2:]))
    while True:
        payee = key(f"payee {nonce % 50}").account
        chain.submit(sign(PAYER, Transaction(CHAIN_ID, nonce, payee, 1, b"", 21_000, 0, 0))[0])
        nonce += 1
        os.write(pipe, f"{chain.head.number} {chain.head.hash.hex()}\n".encode())


def one_life(path: Path, chance: random.Random) -> list[str]:
    """What a child said before it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            write(path, writing)
        finally:  # a child never goes on as its parent does
            os._exit(1)
    os.close(writing)
    said = b""
    if chance.random() < 0.75:  # let it open and write some blocks; else it dies before that
        enough = chance.randrange(6)
        while said.partition(b"open")[2].count(b"\n") <= enough and (more := os.read(reading, 1 << 16)):
            said += more
    time.sleep(chance.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reading, 1 << 16):
        said += more
    os.close(reading)
    return [line for line in said.decode().split("\n")[:-1] if line]  # a line cut short was not told


def main(path: Path, kills: int, seed: int) -> int:
    local_module.CHECKPOINT_EVERY, local_module.CHECKPOINT_LEAST = CHECKPOINT_EVERY, CHECKPOINT_LEAST
    chance = random.Random(seed)
    told: dict[int, str] = {}
    openings = 0
    for life in range(kills):
        highest = max(told, default=-1)
        for line in one_life(path, chance):
            height, block = line.split()
            if height == "open":
                openings += 1
                if not max(highest, 0) <= int(block) <= highest + 1:
                    return _wrong(f"life {life} opened at {block}, its predecessors told of {highest}")
            elif told.setdefault(int(height), block) != block:
                return _wrong(f"life {life}: block {height} is {block}, it was {told[int(height)]}")
    print(json.dumps({"kills": kills, "openings": openings, "blocks": len(told), "last": told[max(told)]}))  # noqa: T201
    return 0


def _wrong(what: str) -> int:
    print(what)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
