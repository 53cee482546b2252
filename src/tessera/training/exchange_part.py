"""What replicas of a stage exchange: a part has a name, an owner, and the owner's signature over its digest.

With the signature it does not matter who serves a part. Whoever serves other bytes than the owner signed is caught by
the digest; an owner whose part is useless, or who signed two for one name, is caught by his own signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.hashing import sha256
from tessera.core.ids import PeerId, RunId, parse_run_id
from tessera.core.signing import PeerKey, verify_peer

__all__ = ["KINDS", "PartHead", "PartName", "SignedPart"]

DOMAIN = "average-part"
KINDS = ("gradient", "partition")  # of a step, of a round
MOST = 2**31  # of a step, a round or an attempt
SIGNATURE_BYTES = 64
DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class PartName:
    """What one part of each replica belongs to."""

    run_id: RunId
    kind: str
    number: int  # the step, or the round
    attempt: int = 0  # a step that starts again, or gets parts anew after a replica died, is another name

    def __post_init__(self) -> None:
        parse_run_id(self.run_id)
        if self.kind not in KINDS:
            raise Invalid(f"a part is one of {', '.join(KINDS)}, not {str(self.kind)[:40]!r}")
        for value in (self.number, self.attempt):
            if type(value) is not int or not 0 <= value < MOST:
                raise Invalid(f"a part's numbers are 0 to {MOST - 1}, not {str(value)[:40]}")

    def to_value(self) -> dict[str, Any]:
        return {"attempt": self.attempt, "kind": self.kind, "number": self.number, "run_id": self.run_id}

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Self:
        """From a request, other fields of which are ignored. Raises: Invalid."""
        return cls(*(value.get(name) for name in ("run_id", "kind", "number", "attempt")))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind} {self.number}, attempt {self.attempt}"


@dataclass(frozen=True, slots=True)
class PartHead:
    """The owner's word on his part."""

    owner: PeerId
    size_bytes: int
    digest: bytes
    signature: bytes

    def check(self, name: PartName) -> None:
        """Raises: Invalid unless the owner signed it for `name`."""
        statement = _statement(name, self.owner, self.size_bytes, self.digest)
        verify_peer(self.owner, DOMAIN, statement, self.signature)

    def to_value(self) -> dict[str, Any]:
        return {"digest": self.digest.hex(), "signature": self.signature.hex(), "size": self.size_bytes}

    @classmethod
    def parse(cls, owner: PeerId, value: dict[str, Any]) -> Self:
        """Raises: Invalid for anything but the fields of a head, in their sizes."""
        if value.keys() != {"digest", "signature", "size"}:
            raise Invalid("a part's head has the fields digest, signature, size")
        size = value["size"]
        if type(size) is not int or size < 0:
            raise Invalid(f"a part's size is a number of bytes, not {str(size)[:40]!r}")
        digest = encoding.hex_bytes(value["digest"], DIGEST_BYTES)
        return cls(owner, size, digest, encoding.hex_bytes(value["signature"], SIGNATURE_BYTES))

    def accusation(self, name: PartName, fault: str) -> Misbehaviour:
        """Against the owner, with what convinces everybody who has the bytes."""
        evidence = {"fault": fault, "head": self.to_value(), "name": name.to_value(), "peer": self.owner}
        return Misbehaviour(f"{self.owner[:16]}…, {name}: {fault}", evidence=evidence, peer=self.owner)


@dataclass(frozen=True, slots=True)
class SignedPart:
    head: PartHead
    data: bytes

    @classmethod
    def sign(cls, key: PeerKey, name: PartName, data: bytes) -> Self:
        digest = sha256(data)
        signature = key.sign(DOMAIN, _statement(name, key.id, len(data), digest))
        return cls(PartHead(key.id, len(data), digest, signature), data)


def _statement(name: PartName, owner: PeerId, size: int, digest: bytes) -> bytes:
    return encoding.encode({**name.to_value(), "digest": digest.hex(), "owner": owner, "size": size})
