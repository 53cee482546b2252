"""The devnet's people: each an account whose key lies in the state directory."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.core.signing import AccountKey
from tessera.training.home import Home

__all__ = ["People", "load_people"]


@dataclass(frozen=True)
class People:
    operator: AccountKey  # deploys contracts, pays gas; owns nothing by it
    data_owner: AccountKey  # gave the text
    creator: AccountKey  # described the run
    buyer: AccountKey  # pays for answers


def load_people(home: Home) -> People:
    """The same people at every start. Raises `Invalid` when a key file is damaged."""
    return People(home.account_key, home.account("data-owner"), home.account("creator"), home.account("buyer"))
