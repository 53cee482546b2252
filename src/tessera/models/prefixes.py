"""What a stage has computed before: full pages, found by the text that leads to them.

A page's key is a hash over all tokens up to its end and over where they came from, so that a text finds a page only if
all before it is equal too. With each page lie the messages that this stage sent for its tokens: the next stage can be
fed from them without computing anything.

Invariants: one reference to a page for each entry; what is used longest ago goes first, the end of a text before its
beginning.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.core.hashing import sha256
from tessera.models.pages import PAGE, Pages

__all__ = ["Prefix", "Prefixes"]


@dataclass(frozen=True, slots=True)
class Prefix:
    """A page of text that was computed."""

    key: bytes
    page: int
    messages: tuple[bytes, ...]  # for each token; none on the last stage


class Prefixes:
    """Bounded by the pages that it holds references to."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._known: OrderedDict[bytes, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, root: bytes, ids: Sequence[int]) -> list[Prefix]:
        """The longest run of known pages with which `ids` begins."""
        found, key = list[Prefix](), root
        for start in range(0, len(ids) - PAGE + 1, PAGE):
            key = self.key(key, ids[start : start + PAGE])
            if (prefix := self._known.get(key)) is None:
                break
            found.append(prefix)
        self.used([prefix.key for prefix in found])
        return found

    def used(self, keys: Sequence[bytes]) -> None:
        """The pages of a text, in order, were used just now."""
        for key in reversed(keys):
            if key in self._known:
                self._known.move_to_end(key)

    def keep(self, key: bytes, page: int, messages: Sequence[bytes]) -> Prefix:
        """The page that `key` names from now on: this one, or an equal one that was there before."""
        known = self._known.get(key)
        if known is None:
            self._pages.hold(page)
            known = self._known[key] = Prefix(key, page, tuple(messages))
        return known

    def free_one(self) -> bool:
        """Forgets the page used longest ago of those that nobody else holds. False when there is none."""
        for key, prefix in self._known.items():
            if not self._pages.shared(prefix.page):
                del self._known[key]
                self._pages.release(prefix.page)
                return True
        return False

    def clear(self) -> None:
        for prefix in self._known.values():
            self._pages.release(prefix.page)
        self._known.clear()

    @staticmethod
    def key(before: bytes, ids: Sequence[int]) -> bytes:
        """Of the page `ids` after the page `before`."""
        return sha256(b"tessera/prefix", before, struct.pack(f"<{len(ids)}I", *ids))
