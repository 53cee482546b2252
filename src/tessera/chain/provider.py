"""A LocalChain as a web3.py provider, in the same process: `Web3(chain.provider())`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from web3.providers.base import JSONBaseProvider

if TYPE_CHECKING:
    from tessera.chain.local import LocalChain

__all__ = ["LocalProvider"]


class LocalProvider(JSONBaseProvider):
    """Goes through the same bytes as HTTP would, so that both give the same answers."""

    def __init__(self, chain: LocalChain) -> None:
        super().__init__()
        self._chain = chain

    def make_request(self, method: Any, params: Any) -> Any:
        return self.decode_rpc_response(self._chain.handle(self.encode_rpc_request(method, params)))

    def is_connected(self, show_traceback: bool = False) -> bool:
        return True
