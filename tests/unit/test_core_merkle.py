"""Merkle trees: the shape, the limits, and the two classic forgeries."""

from __future__ import annotations

import pytest
from eth_abi import encode as abi_encode

from tessera.core.errors import Invalid
from tessera.core.hashing import keccak
from tessera.core.ids import account_from_bytes
from tessera.core.merkle import MAX_DEPTH, MerkleTree, fold, share_leaf

HOLDER = account_from_bytes(bytes(range(20)))
LEAVES = [share_leaf(0, HOLDER, shares) for shares in range(1, 6)]


def test_a_single_leaf_is_its_own_root() -> None:
    tree = MerkleTree(LEAVES[:1])
    assert tree.root == LEAVES[0]
    assert tree.proof(0) == []


def test_an_odd_node_moves_up_unchanged() -> None:
    a, b, c = LEAVES[:3]
    assert MerkleTree([a, b, c]).root == fold(fold(a, [b]), [c])


def test_a_tree_needs_leaves_of_32_bytes() -> None:
    with pytest.raises(Invalid, match="needs a leaf"):
        MerkleTree([])
    with pytest.raises(Invalid, match="32 bytes"):
        MerkleTree([bytes(31)])


@pytest.mark.parametrize("index", [-1, 5])
def test_there_is_no_proof_for_a_leaf_outside_the_tree(index: int) -> None:
    with pytest.raises(Invalid, match="of 5"):
        MerkleTree(LEAVES).proof(index)


def test_the_leaf_is_what_a_contract_computes() -> None:
    encoded = abi_encode(["uint256", "address", "uint256"], [7, HOLDER, 10**18])
    assert share_leaf(7, HOLDER, 10**18) == keccak(keccak(encoded))


@pytest.mark.parametrize(("epoch", "shares"), [(-1, 1), (1, -1), (2**256, 1), (1, 2**256)])
def test_a_leaf_holds_only_what_a_contract_can(epoch: int, shares: int) -> None:
    with pytest.raises(Invalid, match="uint256"):
        share_leaf(epoch, HOLDER, shares)


def test_an_inner_node_cannot_pass_for_a_leaf() -> None:
    """A leaf is hashed twice: the 64 bytes under an inner node would need a pre-image of their first hash."""
    tree = MerkleTree(LEAVES[:4])
    inner = keccak(b"".join(sorted(LEAVES[:2])))
    assert fold(inner, tree.proof(0)[1:]) == tree.root  # true of any tree, so leaves must differ from nodes
    forged_leaf = keccak(keccak(b"".join(sorted(LEAVES[:2]))))
    assert forged_leaf != inner
    assert fold(forged_leaf, tree.proof(0)[1:]) != tree.root


def test_a_proof_is_limited_as_in_the_contract() -> None:
    with pytest.raises(Invalid, match="at most 32 nodes"):
        fold(LEAVES[0], [LEAVES[1]] * (MAX_DEPTH + 1))
    with pytest.raises(Invalid, match="of 32 bytes"):
        fold(LEAVES[0], [bytes(31)])
    with pytest.raises(Invalid, match="of 32 bytes"):
        fold(b"", [])
