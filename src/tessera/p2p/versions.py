"""Which version of what a peer speaks, and how two peers say that theirs differ.

Whoever is refused must be able to act on it alone, so the refusal names both sides: what each speaks, and which product
speaks it. It is phrased where it is read, from the facts that travel in its fields: "they" are always the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tessera import __version__
from tessera.core.errors import Refused, TesseraError

__all__ = ["PRODUCT", "UNNAMED", "VERSION", "Speech", "mismatch", "parse_product", "seen_from_here"]

VERSION = 2  # of the framing, the hello and its answer
PRODUCT = f"tessera {__version__}"
UNNAMED = "a product that does not name itself"

_PRODUCT = re.compile(r"[a-z0-9][A-Za-z0-9 .+/_-]{0,39}")
_NUMBER = re.compile(r"(?:.*/)?(\d{1,9})")
SPOKEN_LIMIT = 200  # characters of a list of protocols


@dataclass(frozen=True, slots=True)
class Speech:
    """What one side speaks: the version of the link, or a protocol, or several with commas between them."""

    spoken: int | str
    product: str

    def __str__(self) -> str:
        return f"{self.spoken} ({self.product})"


def mismatch(ours: Speech, theirs: Speech) -> Refused:
    """The refusal of a peer that speaks another version. Fields: `ours`, `our_product`, `theirs`, `their_product`."""
    our_number, their_number = _number(ours.spoken), _number(theirs.spoken)
    if our_number < their_number:
        advice = "upgrade our side"
    elif our_number > their_number:
        advice = "they must upgrade"
    else:
        advice = "upgrade the older side"
    return Refused(
        f"they speak {theirs}, we speak {ours}: {advice}",
        rule="version",
        ours=ours.spoken,
        our_product=ours.product,
        theirs=theirs.spoken,
        their_product=theirs.product,
    )


def seen_from_here(error: TesseraError) -> TesseraError:
    """A refusal as a peer sent it, in our words: its "ours" is our "theirs". Any other error comes back as it is."""
    if not isinstance(error, Refused) or error.rule != "version":
        return error
    ours = _speech(error.fields.get("theirs"), error.fields.get("their_product"))
    theirs = _speech(error.fields.get("ours"), error.fields.get("our_product"))
    return error if ours is None or theirs is None else mismatch(ours, theirs)


def parse_product(text: object) -> str:
    """What a peer calls its product, for people to read; whatever it sends, the result is short and printable."""
    return text if isinstance(text, str) and _PRODUCT.fullmatch(text) is not None else UNNAMED


def _speech(spoken: object, product: object) -> Speech | None:
    if type(spoken) is int and 0 <= spoken < 2**53:
        return Speech(spoken, parse_product(product))
    if isinstance(spoken, str) and len(spoken) <= SPOKEN_LIMIT and spoken.isascii() and spoken.isprintable():
        return Speech(spoken, parse_product(product))
    return None


def _number(spoken: int | str) -> int:
    """For the advice alone: the version, or the highest among the protocols' last parts."""
    if isinstance(spoken, int):
        return spoken
    found = [_NUMBER.fullmatch(name.strip()) for name in spoken.split(",")]
    return max((int(match[1]) for match in found if match is not None), default=0)
