"""A worker's bond: what the run's contract says of him, and how he pays it without gas."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path

from tessera.chain import artifact
from tessera.chain.authorization import Authorization, authorize
from tessera.chain.client import RpcChain
from tessera.chain.consent import Consent
from tessera.chain.faces import Coin, Run
from tessera.core import encoding
from tessera.core.clock import Clock
from tessera.core.errors import Invalid, PaymentRequired
from tessera.core.ids import Account, PeerId, parse_account
from tessera.core.signing import AccountKey
from tessera.training.home import write_atomic
from tessera.training.manifest import Manifest

__all__ = ["Status", "bond_state", "pay_stake", "peer_bytes", "recall_bond", "remember_bond"]

VALID_S = 3600  # how long the signature under a stake stays good; the host passes it on at once
FILE = "bond.json"


class Status(IntEnum):
    """As in contracts/run.vy, in the order in which a member may pass through them."""

    NOBODY = 0
    BONDED = 1  # waits for the draw
    DRAWN = 2  # has a stage, and waits for the workers
    WORKER = 4
    LEAVING = 8  # a worker still, whose stage looks for another
    LEFT = 16  # the bond waits out its delay
    WITHDRAWN = 32
    SLASHED = 64


def bond_state(member: Run.Member, delay_s: int) -> str:
    """What a person wants to know of his bond, in a few words.

    >>> bond_state(Run.Member(Status.LEFT, 1, bytes(32), 5, 1_800_000_000, 0), 60)
    'free from 2027-01-15 08:00 UTC'
    """
    words = {
        Status.NOBODY: "nothing is bonded",
        Status.BONDED: "bonded, waits for a stage",
        Status.DRAWN: "bonded, waits for the workers",
        Status.WORKER: f"bonded; free {delay_s} s after leaving",
        Status.LEAVING: "bonded; wants to leave",
        Status.LEFT: f"free from {datetime.fromtimestamp(member.since, UTC):%Y-%m-%d %H:%M} UTC",
        Status.WITHDRAWN: "paid back",
        Status.SLASHED: "lost: the other workers have taken it",
    }
    return words[Status(member.status)]


def peer_bytes(peer: PeerId) -> bytes:
    """A peer as the contract knows it."""
    return bytes.fromhex(peer)


async def pay_stake(
    chain: RpcChain, manifest: Manifest, run: Account, asset: Account, key: AccountKey, peer: PeerId, clock: Clock
) -> Authorization:
    """Our signature that lets the run's contract take our stake, for this peer and nothing else.

    Play money that is missing is made. Raises `PaymentRequired`, naming amount, asset and account, for money that only
    somebody else can send.
    """
    stake, coin = manifest.settlement.stake_units, Coin(chain, asset)
    missing = stake - await coin.balanceOf(key.account)
    if missing > 0 and await _is_play_money(chain, asset):
        await coin.mint(key, key.account, missing)
    elif missing > 0:
        raise PaymentRequired(
            f"this run asks for a stake of {stake} units of {asset} on chain {manifest.chain_id}, and {key.account} "
            f"holds {stake - missing}: send it {missing} more, then join again",
            account=key.account, asset=asset, units=missing,
        )  # fmt: skip
    nonce = Consent(manifest.chain_id, run, manifest.run_id).bond_nonce(key.account, peer_bytes(peer))
    return await authorize(coin, key, run, stake, valid_before=int(clock.time()) + VALID_S, nonce=nonce)


async def _is_play_money(chain: RpcChain, asset: Account) -> bool:
    """Whether it is our own test coin, which anybody mints."""
    return (await chain.code(asset)).startswith(artifact.load(Coin.ARTIFACT).runtime)


def remember_bond(folder: Path, manifest: Manifest, run: Account) -> None:
    """Keep, before anything is paid, where the bond will lie: it can be had back if we never become a worker."""
    write_atomic(folder / "manifest.json", manifest.canonical)
    write_atomic(folder / FILE, encoding.encode({"run": run}))


def recall_bond(folder: Path) -> Account | None:
    """The contract of `remember_bond`; None when nothing was bonded from here. Raises `Invalid` for damage."""
    try:
        value = encoding.decode((folder / FILE).read_bytes(), 4096)
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise Invalid(f"{folder / FILE} is damaged")
    return parse_account(value.get("run"))
