"""Contracts on a bare state: no blocks, no journal, no signed transactions, so that ten thousand calls take a minute.

It is our own engine with the shipped bytecode. Any account may be the sender, contracts too. Storage can be read
directly, by the compiler's layout, which is a hundred times cheaper than asking a view.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from vyper.compiler import compile_code, compile_from_file_input
from vyper.compiler.input_bundle import FilesystemInputBundle

from chain_support import CHAIN_ID, NOW, ROOT
from tessera.chain import abi, artifact
from tessera.chain.engine import BlockEnv, Message, State
from tessera.chain.reverts import revert_reason
from tessera.chain.world import World
from tessera.core.hashing import keccak
from tessera.core.ids import Account, account_from_bytes

SENDER = Account("0x" + "11" * 20)


class Reverted(Exception):
    """A contract said no, with this reason."""


class Vm:
    """One state. `freeze` keeps it, and any number of others go on from there."""

    def __init__(self, world: World | None = None) -> None:
        self.state = State(world or World.empty())
        self.number, self.timestamp = 1_000, NOW

    def freeze(self) -> World:
        return self.state.world

    def run(self, sender: Account, to: Account | None, data: bytes) -> bytes:
        """One transaction in a block of its own. Raises `Reverted`."""
        self.number += 1
        ancestors = (keccak(n.to_bytes(8, "big")) for n in range(self.number - 1, self.number - 257, -1))
        env = BlockEnv(CHAIN_ID, self.number, self.timestamp, ancestors)
        target = None if to is None else bytes.fromhex(to[2:])
        outcome = self.state.call(Message(bytes.fromhex(sender[2:]), target, data), env)
        self.state._state.lock_changes()
        if not outcome.ok:
            raise Reverted(revert_reason(outcome.output) if outcome.reverted else outcome.error)
        return outcome.contract if outcome.contract else outcome.output


class Deployed:
    """A contract of the package in one `Vm`. Methods are called by name."""

    def __init__(self, vm: Vm, name: str, address: Account) -> None:
        self.vm, self.name, self.address = vm, name, address
        self._at = bytes.fromhex(address[2:])

    @classmethod
    def new(cls, vm: Vm, name: str, *args: Any) -> Deployed:
        return cls(vm, name, account_from_bytes(vm.run(SENDER, None, _artifact(name).init_code(*args))))

    @classmethod
    def of_source(cls, vm: Vm, name: str, source: str) -> Deployed:
        """A test's own contract, in Vyper, without arguments for its constructor. Its storage cannot be `read`."""
        if name not in _own:
            out = compile_code(source, output_formats=["abi", "bytecode"])
            _own[name] = artifact.Artifact(name, out["abi"], bytes.fromhex(out["bytecode"][2:]), b"", "vyper", {})
        return cls.new(vm, name)

    def __call__(self, method: str, *args: Any, sender: Account = SENDER) -> Any:
        """What it answers. Raises `Reverted`."""
        outputs = _methods(self.name)[method, len(args)][2]
        answer = self.vm.run(sender, self.address, self.data(method, *args))
        values = abi.decode(outputs, answer) if outputs else (None,)
        return values[0] if len(values) == 1 else values

    def data(self, method: str, *args: Any) -> bytes:
        """What a call of it carries."""
        selector, types, _ = _methods(self.name)[method, len(args)]
        return selector + abi.encode(types, args)

    def read(self, variable: str, *keys: Account | bytes | int, field: int = 0) -> int:
        """A storage variable, an item of a HashMap by its keys, or a struct's field."""
        slot: int = _layout(self.name)[variable]
        for key in keys:
            slot = int.from_bytes(keccak(slot.to_bytes(32, "big") + _word(key)), "big")
        return self.vm.state.storage(self._at, (slot + field) % 2**256)


def _word(key: Account | bytes | int) -> bytes:
    if isinstance(key, int):
        return key.to_bytes(32, "big")
    return (bytes.fromhex(key[2:]) if isinstance(key, str) else key).rjust(32, b"\0")


_own: dict[str, artifact.Artifact] = {}


def _artifact(name: str) -> artifact.Artifact:
    return _own[name] if name in _own else artifact.load(name)


@cache
def _methods(name: str) -> dict[tuple[str, int], tuple[bytes, tuple[str, ...], tuple[str, ...]]]:
    table = {}
    for entry in _artifact(name).abi:
        if entry["type"] == "function":
            types = tuple(abi.type_of(item) for item in entry["inputs"])
            selector = keccak(f"{entry['name']}({','.join(types)})".encode())[:4]
            table[entry["name"], len(types)] = selector, types, tuple(abi.type_of(item) for item in entry["outputs"])
    return table


@cache
def _layout(name: str) -> dict[str, int]:
    """Slots by variable, a module's as `accrual.index`. Vyper gives them in the order of declaration."""
    bundle = FilesystemInputBundle([ROOT / "contracts"])
    path = ROOT / "contracts" / f"{name}.vy"
    out = compile_from_file_input(bundle.load_file(path), input_bundle=bundle, output_formats=["layout"])
    return _flat(out["layout"]["storage_layout"])


def _flat(layout: dict[str, Any], prefix: str = "") -> dict[str, int]:
    slots: dict[str, int] = {}
    for name, value in layout.items():
        if "slot" in value:
            slots[prefix + name] = value["slot"]
        else:
            slots |= _flat(value, f"{prefix}{name}.")
    return slots
