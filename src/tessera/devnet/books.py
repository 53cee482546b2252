"""The books: epochs, shares and income of one run as the chain has them; and what anybody may do to move them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from tessera.chain import abi
from tessera.chain.client import RpcChain
from tessera.chain.faces import ModelShare, Run
from tessera.chain.indexer.model_share import ShareView, share_index
from tessera.chain.settle import IncomeTable, income_table
from tessera.core.ids import Account
from tessera.core.merkle import share_leaf
from tessera.core.signing import AccountKey, recover_account
from tessera.devnet.snapshot import RECENT_LIMIT, Payment
from tessera.p2p.transport import Transport
from tessera.training.book import ReceiptBook
from tessera.training.epochs import EpochLeaves
from tessera.training.keeper import known_leaves
from tessera.training.manifest import Manifest
from tessera.training.payee import split_of
from tessera.training.roster import Roster

__all__ = ["Books", "Figures"]

log = structlog.get_logger()

EMPTY = IncomeTable(0, 0, {}, {}, {}, 0, 0, 0, 0, {}, 0, 0)


@dataclass
class Figures:
    """What the chain says; money and shares in their smallest units."""

    epochs: list[EpochLeaves] = field(default_factory=list)
    postings: dict[int, str] = field(default_factory=dict)  # epoch -> transaction
    signers: dict[int, tuple[str, ...]] = field(default_factory=dict)  # epoch -> peers
    shares: dict[Account, int] = field(default_factory=dict)  # balances and leaves not yet redeemed
    claimable: dict[Account, int] = field(default_factory=dict)
    total_shares: int = 0
    paid_by: dict[Account, str] = field(default_factory=dict)  # holder -> the last transaction that paid it
    payments: list[Payment] = field(default_factory=list)  # the newest into the share contract, oldest first
    requests_paid: int = 0
    income: IncomeTable = EMPTY
    at_split: int = 0  # units that wait to be divided between shares and workers

    def earned(self, account: Account) -> int:
        """Shares that the posted epochs give `account`, redeemed or not."""
        return sum(leaves.shares_of(account) for leaves in self.epochs)


class Books:
    """Read from the chain by `refresh`; `figures` are as of then.

    Args:
        accounts: whose shares and income are looked up.
    """

    def __init__(
        self,
        chain: RpcChain,
        manifest: Manifest,
        roster: Roster,
        transport: Transport,
        book: ReceiptBook,
        accounts: Sequence[Account],
    ) -> None:
        self._manifest = manifest
        self._chain, self._roster, self._transport, self._book = chain, roster, transport, book
        self._share, self._run = ModelShare(chain, roster.share), Run(chain, roster.run)
        self._index = share_index(None, chain, roster.share, roster.coin)  # small enough to read again at each start
        self._told = ShareView(self._index.queries)
        self._accounts = tuple(dict.fromkeys(accounts))
        self._seen = ""  # the newest block's hash
        self._redeemed: set[tuple[int, Account]] = set()  # leaves, for good
        self.figures = Figures()

    async def refresh(self) -> None:
        """Read again if the chain has moved. Raises what the chain or the workers do; the old figures stay then."""
        head = await self._chain.header()
        if head is None or head.hash == self._seen:
            return
        await self._read_epochs()
        await self._read_index()
        for account in self._accounts:
            self.figures.shares[account] = await self._share.balanceOf(account) + await self._unredeemed(account)
            self.figures.claimable[account] = await self._share.claimable(account)
        self.figures.total_shares = await self._share.totalSupply()
        self.figures.income = await income_table(self._chain, self._roster.share)
        split = await split_of(self._chain, self._manifest)
        self.figures.at_split = 0 if split is None else await split.undistributed()
        self._seen = head.hash

    def follow(self, roster: Roster, accounts: Sequence[Account]) -> None:
        """From now on `roster`'s workers, and these accounts."""
        self._roster, self._accounts = roster, tuple(dict.fromkeys(accounts))
        self._seen = ""

    def close(self) -> None:
        self._index.close()

    async def distribute(self, sender: AccountKey) -> None:
        """Spread what has arrived, at the split first where there is one. Anyone may; it costs the sender gas."""
        split = await split_of(self._chain, self._manifest)
        if split is not None and await split.undistributed() > 0:
            await split.distribute(sender)
        if self.figures.income.undistributed > 0:
            await self._share.distribute(sender)

    async def pay_out(self, account: Account, sender: AccountKey) -> None:
        """Redeem `account`'s leaves and claim its income. Anyone may; the money goes to `account` alone."""
        for leaves in self.figures.epochs:
            shares = leaves.shares_of(account)
            if shares and not await self._share.counted(share_leaf(leaves.epoch, account, shares)):
                await self._share.redeem(sender, leaves.epoch, account, shares, leaves.proof(account))
        if await self._share.claimable(account) > 0:
            await self._share.claim(sender, account)

    async def _unredeemed(self, account: Account) -> int:
        """Shares in `account`'s leaves that nobody has redeemed yet."""
        waiting = 0
        for leaves in self.figures.epochs:
            leaf = (leaves.epoch, account)
            if leaf not in self._redeemed and (shares := leaves.shares_of(account)):
                if await self._share.counted(share_leaf(leaves.epoch, account, shares)):
                    self._redeemed.add(leaf)
                else:
                    waiting += shares
        return waiting

    async def _read_index(self) -> None:
        """Payments, claims and postings, each with the transaction that proves it."""
        await self._index.update()
        figures = self.figures
        figures.requests_paid = self._told.revenue().count
        paid = reversed(self._told.payments.payments(limit=RECENT_LIMIT))
        figures.payments = [Payment(p.tx_hash, p.payer, p.amount, float(p.time)) for p in paid]
        figures.paid_by = {holder: figure.tx_hash for holder, figure in self._told.claimed().items()}
        for epoch, posting in self._told.postings().items():
            if figures.postings.get(epoch) != posting.tx_hash:
                figures.signers[epoch] = await self._signers(epoch)
                figures.postings[epoch] = posting.tx_hash

    async def _read_epochs(self) -> None:
        for epoch in range(len(self.figures.epochs), await self._share.epoch_count()):
            leaves = await self._leaves(epoch)
            self.figures.epochs.append(leaves)
            log.info("epoch_on_chain", epoch=epoch, shares=str(leaves.total))

    async def _signers(self, epoch: int) -> tuple[str, ...]:
        """The peers who signed the proposal that was posted, recovered from its transaction."""
        proposed = (await self._run.events(Run.Proposed, topics=[epoch.to_bytes(32, "big")]))[-1]
        transaction = await self._chain.request("eth_getTransactionByHash", [proposed.log.tx_hash])
        data = bytes.fromhex(transaction["input"][2:])
        *_, signatures = abi.decode(["uint256", "bytes32", "uint256", "bytes[]"], data[4:])
        digest = await self._run.epoch_digest(epoch, proposed.attempt, proposed.root, proposed.shares)
        accounts = {recover_account(digest, signature) for signature in signatures}
        return tuple(seat.peer for seat in self._roster.everyone if seat.account in accounts)

    async def _leaves(self, epoch: int) -> EpochLeaves:
        text = self._book.epoch(epoch)
        if text is not None:
            return EpochLeaves.from_text(text)
        leaves = await known_leaves(self._transport, self._roster, self._share, epoch)
        self._book.save_epoch(epoch, leaves.to_text())
        return leaves
