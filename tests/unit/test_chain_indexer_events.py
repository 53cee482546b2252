"""Every event of every contract is reduced, or named as saying nothing."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.resources import files

import pytest

import tessera.chain.indexer
from tessera.chain.artifact import load
from tessera.chain.indexer.facts import Reducer
from tessera.core.hashing import keccak

REDUCERS = {
    value.name: value
    for module in pkgutil.iter_modules(tessera.chain.indexer.__path__, "tessera.chain.indexer.")
    for value in vars(importlib.import_module(module.name)).values()
    if isinstance(value, Reducer)
}
NO_READER_YET = {"permit2", "x402_exact_proxy", "x402_upto_proxy"}


def events_of(contract: str) -> dict[bytes, str]:
    found = [entry for entry in load(contract).abi if entry["type"] == "event"]
    signatures = {e["name"]: f"{e['name']}({','.join(item['type'] for item in e['inputs'])})" for e in found}
    return {keccak(signature.encode()): name for name, signature in signatures.items()}


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_each_event_is_reduced_or_silent_and_never_both(name: str) -> None:
    reducer = REDUCERS[name]
    said, silent = ({kind.TOPIC for kind in kinds} for kinds in (reducer.says, reducer.silent))
    assert not said & silent
    assert {topic: topic for topic in said | silent}.keys() == events_of(name).keys()


def test_each_contract_with_events_has_a_reducer() -> None:
    folder = files("tessera.chain") / "artifacts"
    contracts = {item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")}
    assert {name for name in contracts if events_of(name)} - set(REDUCERS) <= NO_READER_YET
