"""Ethereum's Merkle-Patricia trie over hashed keys, in memory, never changed: `put` gives a new root that shares nodes.

Whoever holds a root reads that state for as long as he likes, while others write; what nobody holds is freed. Keys are
Keccak hashes, all of one length, so that no branch carries a value. A node is encoded and hashed once, when somebody
asks for a root above it.

Values are ints, and whatever says itself how it is encoded. `contents` and `restored` are the trie's form on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, Protocol

import rlp

from tessera.chain.rlp_forms import rlp_bytes, rlp_encode, rlp_list
from tessera.core.hashing import keccak

__all__ = [
    "EMPTY_ROOT", "Node", "Value", "contents", "get", "leaves", "path_of", "put", "remove", "restored", "root_hash",
]  # fmt: skip

EMPTY_ROOT = keccak(b"\x80")

_TO_NIBBLES = bytes.maketrans(b"0123456789abcdef", bytes(range(16)))
_TO_HEX = bytes.maketrans(bytes(range(16)), b"0123456789abcdef")
_NOTHING = b"\x80"


class Value(Protocol):
    """What a leaf holds."""

    def rlp(self) -> bytes: ...


class Leaf:
    """The end of a path: nibbles that no branch has used up, and the value."""

    __slots__ = ("_ref", "path", "value")

    def __init__(self, path: bytes, value: int | Value) -> None:
        self.path, self.value, self._ref = path, value, b""

    def encoded(self) -> bytes:
        value = rlp_encode(self.value) if isinstance(self.value, int) else self.value.rlp()
        return rlp_list(rlp_bytes(_packed(self.path, 2)) + rlp_bytes(value))

    @property
    def ref(self) -> bytes:
        if not self._ref:
            self._ref = _named(self.encoded())
        return self._ref


class Extension:
    """Nibbles that all keys below share; `child` is a branch."""

    __slots__ = ("_ref", "child", "path")

    def __init__(self, path: bytes, child: Branch) -> None:
        self.path, self.child, self._ref = path, child, b""

    def encoded(self) -> bytes:
        return rlp_list(rlp_bytes(_packed(self.path, 0)) + self.child.ref)

    @property
    def ref(self) -> bytes:
        if not self._ref:
            self._ref = _named(self.encoded())
        return self._ref


class Branch:
    """Sixteen ways to go on, at least two of them taken."""

    __slots__ = ("_ref", "children")

    def __init__(self, children: tuple[Node | None, ...]) -> None:
        self.children, self._ref = children, b""

    def encoded(self) -> bytes:
        return rlp_list(b"".join([_NOTHING if child is None else child.ref for child in self.children]) + _NOTHING)

    @property
    def ref(self) -> bytes:
        if not self._ref:
            self._ref = _named(self.encoded())
        return self._ref


Node = Leaf | Extension | Branch


def root_hash(node: Node | None) -> bytes:
    """The 32 bytes that commit to everything below `node`; None is the empty trie.

    Cost: one Keccak for each node that is new since the last time.
    """
    if node is None:
        return EMPTY_ROOT
    ref = node.ref
    return ref[1:] if len(ref) == 33 else keccak(ref)  # a tiny trie's root is hashed although it could be embedded


@lru_cache(maxsize=1 << 16)
def path_of(key: bytes) -> bytes:
    """Where `key` lies: the 64 nibbles of its Keccak."""
    return keccak(key).hex().encode().translate(_TO_NIBBLES)


def get(node: Node | None, path: bytes) -> int | Value | None:
    """The value at `path`, or None."""
    while node is not None:
        if isinstance(node, Branch):
            node, path = node.children[path[0]], path[1:]
        elif isinstance(node, Leaf):
            return node.value if node.path == path else None
        else:
            length = len(node.path)
            node, path = (node.child, path[length:]) if path[:length] == node.path else (None, b"")
    return None


def put(node: Node | None, path: bytes, value: int | Value) -> Node:
    """The trie with `value` at `path`.  Cost: a new node for each level, none is hashed."""
    if node is None:
        return Leaf(path, value)
    if isinstance(node, Branch):
        return _with_child(node, path[0], put(node.children[path[0]], path[1:], value))
    shared = _shared(node.path, path)
    if shared == len(node.path):
        if isinstance(node, Leaf):
            return Leaf(path, value)
        child = put(node.child, path[shared:], value)
        return Extension(node.path, child) if isinstance(child, Branch) else _joined(node.path, child)
    children: list[Node | None] = [None] * 16
    children[node.path[shared]] = _shortened(node, shared + 1)
    children[path[shared]] = Leaf(path[shared + 1 :], value)
    fork = Branch(tuple(children))
    return Extension(path[:shared], fork) if shared else fork


def remove(node: Node | None, path: bytes) -> Node | None:
    """The trie without what is at `path`; the same when there is nothing."""
    if node is None:
        return None
    if isinstance(node, Leaf):
        return None if node.path == path else node
    if isinstance(node, Extension):
        length = len(node.path)
        if path[:length] != node.path:
            return node
        child = remove(node.child, path[length:])
        return node if child is node.child or child is None else _joined(node.path, child)
    before = node.children[path[0]]
    after = remove(before, path[1:])
    if after is before:
        return node
    if after is not None:
        return _with_child(node, path[0], after)
    rest = [(nibble, child) for nibble, child in enumerate(node.children) if child is not None and nibble != path[0]]
    if len(rest) > 1:
        return _with_child(node, path[0], None)
    nibble, last = rest[0]
    return _joined(bytes([nibble]), last)


def leaves(node: Node | None, path: bytes = b"") -> Iterator[tuple[bytes, int | Value]]:
    """Every path of 64 nibbles with its value, ascending."""
    if isinstance(node, Leaf):
        yield path + node.path, node.value
    elif isinstance(node, Extension):
        yield from leaves(node.child, path + node.path)
    elif node is not None:
        for nibble, child in enumerate(node.children):
            yield from leaves(child, path + bytes([nibble]))


def contents(node: Node | None, known: Collection[bytes] = ()) -> Iterator[tuple[bytes, bytes, list[int | Value]]]:
    """Hash, encoding and values of every node with a hash of its own, without what hangs below `known` hashes."""
    pending = [] if node is None else [node]
    while pending:
        node = pending.pop()
        name = root_hash(node)
        if name not in known:
            values: list[int | Value] = []
            _gather(node, pending, values)
            yield name, node.encoded(), values


def restored(name: bytes, content: Mapping[bytes, bytes], value_of: Callable[[bytes], int | Value]) -> Node | None:
    """The trie with this root hash, of nodes by their hash. Whether it really has that hash is the caller's to ask.

    Args:
        value_of: reads the encoding of a value.

    Raises: KeyError for a node that is missing; ValueError or TypeError for one that is none.
    """

    def build(items: Any) -> Node:
        if len(items) == 17:
            return Branch(tuple(child(item) for item in items[:16]))
        packed, rest = items
        digits = packed.hex()
        path = (digits[1:] if packed[0] & 0x10 else digits[2:]).encode().translate(_TO_NIBBLES)
        if packed[0] & 0x20:
            return Leaf(path, value_of(rest))
        below = child(rest)
        if not isinstance(below, Branch):
            raise ValueError("an extension leads to a branch")
        return Extension(path, below)

    def child(item: Any) -> Node | None:
        if isinstance(item, (list, tuple)):
            return build(item)
        return build(rlp.decode(content[item])) if item else None

    return None if name == EMPTY_ROOT else build(rlp.decode(content[name]))


def _gather(node: Node, pending: list[Node], values: list[int | Value]) -> None:
    """The values in a node, and its children; those without a hash of their own are a part of it."""
    if isinstance(node, Leaf):
        values.append(node.value)
        return
    for child in node.children if isinstance(node, Branch) else (node.child,):
        if child is None:
            continue
        if len(child.ref) == 33:
            pending.append(child)
        else:
            _gather(child, pending, values)


def _with_child(branch: Branch, nibble: int, child: Node | None) -> Branch:
    children = branch.children
    return Branch((*children[:nibble], child, *children[nibble + 1 :]))


def _joined(path: bytes, child: Node) -> Node:
    """`child`, reached by `path` too."""
    if isinstance(child, Leaf):
        return Leaf(path + child.path, child.value)
    if isinstance(child, Extension):
        return Extension(path + child.path, child.child)
    return Extension(path, child)


def _shortened(node: Leaf | Extension, by: int) -> Node:
    """What is left of `node` below a branch that uses up `by` of its nibbles."""
    rest = node.path[by:]
    if isinstance(node, Leaf):
        return Leaf(rest, node.value)
    return Extension(rest, node.child) if rest else node.child


def _shared(one: bytes, other: bytes) -> int:
    """How many nibbles two paths begin with together."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _packed(path: bytes, flag: int) -> bytes:
    """Hex-prefix form: two nibbles a byte, with oddness and the kind of node (2 = leaf) in the first."""
    digits = path.translate(_TO_HEX).decode()
    return bytes.fromhex(f"{flag + 1:x}{digits}" if len(path) % 2 else f"{flag:x}0{digits}")


def _named(encoded: bytes) -> bytes:
    """How a parent names a node: by its hash, unless the node itself is shorter."""
    return encoded if len(encoded) < 32 else b"\xa0" + keccak(encoded)
