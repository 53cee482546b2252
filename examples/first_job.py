"""A first job: one agent hires another, a third one judges, and the escrow pays. Offline, on a chain in memory.

.venv/bin/python examples/first_job.py
"""

import anyio

from tessera.agents.commerce.seller import Service
from tessera.agents.commerce.terms import Brief
from tessera.devnet.fair import open_fair


async def write(brief: Brief) -> bytes:  # what the seller does
    return f"Small stones, laid well: {brief.text}".encode()


async def look(brief: Brief, work: bytes) -> str:  # what the judge says is wrong; "" for nothing
    return "" if brief.text.encode() in work else "that is about something else"


async def main() -> None:
    async with open_fair(coins=100) as fair:
        seller, judge = fair.seller({"write": Service(40, write)}), fair.judge({"write": look})
        progress, work = await fair.trade(fair.order(seller, judge, "write", "mosaics", units=40))
        print(progress.phase.name, work.decode(), await fair.jobs.balance(seller.account))


if __name__ == "__main__":
    anyio.run(main)
