"""The x402 facilitator inside the gateway: its signer, over our chain client.

Two schemes: `exact` moves what was signed, by EIP-3009 or through Permit2; `upto` moves what was used, at most what was
signed, through Permit2 and x402's proxy, and only by this facilitator's hand. x402's schemes verify and settle
synchronously; the chain client is asynchronous. So a scheme runs in a worker thread of its own limiter, and each chain
call goes back to the event loop. A failure to reach the chain is kept
apart from a payment that the chain refuses: the first is the gateway's trouble, the second is the buyer's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
from anyio import CapacityLimiter
from eth_abi.abi import decode as abi_decode

from tessera.core.errors import Late, TesseraError, Unavailable
from tessera.core.ids import Account, parse_account
from tessera.core.signing import AccountKey

if TYPE_CHECKING:
    from x402.mechanisms.evm.types import TransactionReceipt
    from x402.schemas import (
        PaymentPayload,
        PaymentRequirements,
        SettleResponse,
        SupportedResponse,
        VerifyResponse,
    )

__all__ = ["Facilitator", "PaymentChain", "load_x402"]

MAX_THREADS = 8
T = TypeVar("T")


class SentTransaction(Protocol):
    """What the chain says of a transaction that took place; each log has address, topics and data."""

    @property
    def tx_hash(self) -> str: ...
    @property
    def ok(self) -> bool: ...
    @property
    def block_number(self) -> int: ...
    @property
    def logs(self) -> Sequence[Any]: ...


class PaymentChain(Protocol):
    """What payments ask of a chain; `tessera.chain.RpcChain` is one."""

    async def chain_id(self) -> int: ...
    async def call(self, to: Account, data: bytes, *, sender: Account | None = None) -> bytes: ...
    async def code(self, account: Account) -> bytes: ...
    async def block_number(self) -> int: ...
    async def logs(
        self, address: Account, topics: Sequence[bytes | None], from_block: int, to_block: int | None = None
    ) -> Sequence[Any]: ...
    async def receipt(self, tx_hash: str) -> SentTransaction | None: ...
    async def send(self, key: AccountKey, to: Account, data: bytes) -> SentTransaction:
        """Raises: Late, with `tx_hash` in its fields, when the transaction was sent but is in no block yet."""
        ...


def load_x402() -> None:
    """Imports x402, which takes about a second: call it in a thread before the first payment comes."""
    import x402.mechanisms.evm.exact.facilitator
    import x402.mechanisms.evm.upto.facilitator
    import x402.schemas  # noqa: F401


class Facilitator:
    """Verifies and settles payments on one chain, paying the gas with `key`. It is a facilitator client of x402's own
    resource server too: hand it over in the place of a URL.
    """

    def __init__(self, chain: PaymentChain, key: AccountKey, chain_id: int) -> None:
        from x402.pending_settlement_store import InMemoryPendingSettlementStore

        self._chain = chain
        self._key = key
        self._chain_id = chain_id
        self._pending = InMemoryPendingSettlementStore()
        # Its own limiter: chain calls may need threads of the default one, and must never wait for us to free them.
        self._limiter = CapacityLimiter(MAX_THREADS)

    async def verify(self, payload: PaymentPayload, requirements: PaymentRequirements) -> VerifyResponse:
        """x402's verdict. Raises: Unavailable or Late when the chain could not be asked."""
        return await self._run(requirements, lambda scheme: scheme.verify(payload, requirements))

    async def settle(self, payload: PaymentPayload, requirements: PaymentRequirements) -> SettleResponse:
        """Sends the transfer of `requirements.amount` and waits for it.

        Raises: Unavailable or Late when the chain gave no answer.
        """
        return await self._run(requirements, lambda scheme: scheme.settle(payload, requirements))

    def get_supported(self) -> SupportedResponse:
        """What x402's resource server asks before it makes offers."""
        from x402.schemas import SupportedKind, SupportedResponse

        extras = {"exact": None, "upto": {"facilitatorAddress": self._key.account}}
        kinds = [
            SupportedKind(x402_version=2, scheme=scheme, network=f"eip155:{self._chain_id}", extra=extra)
            for scheme, extra in extras.items()
        ]
        return SupportedResponse(kinds=kinds, signers={"eip155:*": [self._key.account]})

    async def _run(self, requirements: PaymentRequirements, work: Callable[[Any], T]) -> T:
        from x402.mechanisms.evm.exact.facilitator import ExactEvmScheme
        from x402.mechanisms.evm.upto.facilitator import UptoEvmScheme

        signer = _Signer(self._chain, self._key, self._chain_id)
        kind = UptoEvmScheme if requirements.scheme == "upto" else ExactEvmScheme
        scheme = kind(signer, pending_store=self._pending)
        # Shielded, also because a call from a thread whose scope is cancelled already never ends in anyio 4.16: its
        # first checkpoint waits for a cancellation that was delivered before. Each chain call has its own deadline.
        with anyio.CancelScope(shield=True):
            result = await anyio.to_thread.run_sync(work, scheme, limiter=self._limiter)
        if signer.trouble is not None:
            raise signer.trouble
        return result


class _Signer:
    """x402's `FacilitatorEvmSigner` for one verification or settlement. Called in a worker thread."""

    def __init__(self, chain: PaymentChain, key: AccountKey, chain_id: int) -> None:
        self._chain = chain
        self._key = key
        self._chain_id = chain_id
        self._receipts: dict[str, SentTransaction] = {}
        self.trouble: TesseraError | None = None  # why the chain could not be asked

    def get_addresses(self) -> list[str]:
        return [self._key.account]

    def get_chain_id(self) -> int:
        return self._chain_id

    def get_code(self, address: str) -> bytes:
        return self._ask(lambda: self._chain.code(parse_account(address)))

    def read_contract(self, address: str, abi: list[dict[str, Any]], function_name: str, *args: Any) -> Any:
        from x402.mechanisms.evm.multicall import encode_contract_call

        data = encode_contract_call(abi, function_name, *args)
        result = self._ask(lambda: self._chain.call(parse_account(address), data, sender=self._key.account))
        function = next(entry for entry in abi if entry.get("name") == function_name)
        values = abi_decode([output["type"] for output in function.get("outputs", [])], result)
        return values[0] if len(values) == 1 else (values or None)

    def write_contract(
        self, address: str, abi: list[dict[str, Any]], function_name: str, *args: Any, data_suffix: str | None = None
    ) -> str:
        from x402.mechanisms.evm.multicall import encode_contract_call

        suffix = bytes.fromhex((data_suffix or "").removeprefix("0x"))
        return self.send_transaction(address, encode_contract_call(abi, function_name, *args) + suffix)

    def send_transaction(self, to: str, data: bytes) -> str:
        try:
            receipt = self._ask(lambda: self._chain.send(self._key, parse_account(to), data))
        except Late as error:
            if not isinstance(tx_hash := error.fields.get("tx_hash"), str):
                raise
            self.trouble = None  # it is on its way: x402 keeps its hash, and a later try waits for it
            return tx_hash
        self._receipts[receipt.tx_hash] = receipt
        return receipt.tx_hash

    def wait_for_transaction_receipt(self, tx_hash: str) -> TransactionReceipt:
        from x402.mechanisms.evm.types import TransactionReceipt

        receipt = self._receipts.get(tx_hash)  # `send` waits for it
        if receipt is None:  # it did not come in time, now or when the same payment came before
            found = self._ask(lambda: self._chain.receipt(tx_hash))
            if found is None:
                raise TimeoutError(f"no block has {tx_hash} yet")
            receipt = found
        logs = [_log(log) for log in receipt.logs]
        return TransactionReceipt(1 if receipt.ok else 0, receipt.block_number, tx_hash, logs)

    def verify_typed_data(self, *args: Any, **kwargs: Any) -> bool:
        raise NotImplementedError("x402 checks signatures by itself, with `get_code` and `read_contract`")

    def get_balance(self, address: str, token_address: str) -> int:
        raise NotImplementedError("x402 reads balances with `read_contract`")

    def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
        async def asked() -> T:
            return await question()

        try:
            return anyio.from_thread.run(asked)
        except (Unavailable, Late) as error:
            self.trouble = error
            raise
        except TesseraError as error:  # x402 knows a refusal of the chain by this word
            raise RuntimeError(f"execution reverted: {error.message}") from error


def _log(log: Any) -> dict[str, Any]:
    return {"address": log.address, "topics": list(log.topics), "data": log.data}
