"""The tokenizer of a model made elsewhere: tokenizer.json of whatever kind, and what tokenizer_config.json adds to it.

Two ways in. `encode` is for a prompt that its writer composed as a whole: markers in it are the model's markers. A chat
is composed by the model's template around what others wrote; `guarded` makes their markers text before, and
`encode_chat` leaves it text, so nobody begins a system message from within his own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as _Engine

from tessera.core.errors import Invalid
from tessera.models.plain import read_json

__all__ = ["TOKENIZER_CONFIG_LIMIT", "TOKENIZER_LIMIT", "PlainTokenizer", "TokenizerFacts"]

TOKENIZER_CONFIG_LIMIT = 4 << 20  # bytes of tokenizer_config.json
TOKENIZER_LIMIT = 64 << 20  # bytes of tokenizer.json
TEMPLATE_LIMIT = 256 << 10  # characters of a chat template
VOCABULARY_LIMIT = 2**20
GUARD = "\ufdd0"  # a code point that is never a character: stands in a marker which is only text
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What tokenizer_config.json says.

    Attributes:
        named: texts of tokens that a template may name: bos_token, eos_token, unk_token, pad_token.
        begins: whether a prompt starts with bos_token; None: as tokenizer.json says.
        template: of a chat, in Jinja; "" = the model has none.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    begins: bool | None = None
    template: str = ""

    @classmethod
    def read(cls, data: bytes, template: str = "") -> TokenizerFacts:
        """From tokenizer_config.json. `template`: of a file of its own, which newer checkpoints have.

        Raises: Invalid: it is no object, or the template no text or too long.
        """
        found = read_json(data, "tokenizer_config.json")
        named = {name: text for name in _NAMED if (text := _text_of(found.get(name)))}
        begins = found.get("add_bos_token")
        template = template or _default_template(found.get("chat_template"))
        if len(template) > TEMPLATE_LIMIT:
            raise Invalid(f"a chat template of {len(template)} characters: at most {TEMPLATE_LIMIT} expected")
        return cls(named, begins if isinstance(begins, bool) else None, template)


class PlainTokenizer:
    """Text to token ids and back, as the model was trained with. Raises: Invalid: `data` is no tokenizer.json."""

    def __init__(self, data: bytes, facts: TokenizerFacts) -> None:
        if len(data) > TOKENIZER_LIMIT:
            raise Invalid(f"tokenizer.json has {len(data)} bytes: at most {TOKENIZER_LIMIT} expected")
        try:
            self._engine = _Engine.from_str(data.decode())
            vocabulary = self._engine.get_vocab(with_added_tokens=True)
        except Exception as error:  # the engine raises bare Exception for every bad file
            raise Invalid(f"not a tokenizer.json: {str(error)[:200]}") from error
        self._size = max(vocabulary.values(), default=-1) + 1
        if not 1 <= self._size <= VOCABULARY_LIMIT:
            raise Invalid(f"a vocabulary of {self._size} tokens: 1 to {VOCABULARY_LIMIT} expected")
        self.facts = facts
        added = self._engine.get_added_tokens_decoder()
        self._markers = {token.content: number for number, token in added.items() if token.special and token.content}
        longest_first = sorted(self._markers, key=len, reverse=True)
        self._any_marker = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self._size

    def token(self, text: str) -> int | None:
        """The id of the token that is exactly `text`."""
        found = self._engine.token_to_id(text)
        return None if found is None else int(found)

    def encode(self, text: str) -> list[int]:
        """A whole prompt, with the token that begins one where the model has it."""
        begins = self.facts.begins
        ids = list(self._engine.encode(text, add_special_tokens=begins is not False).ids)
        first = self.token(self.facts.named.get("bos_token", ""))
        return [first, *ids] if begins and first is not None and ids[:1] != [first] else ids

    def guarded(self, text: str) -> str:
        """`text` with every marker in it broken, for a template. Raises: Invalid: `text` holds a non-character."""
        if GUARD in text:
            raise Invalid("a message holds U+FDD0, which is not a character", param="messages")
        if self._any_marker is None:
            return text
        return self._any_marker.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)

    def encode_chat(self, rendered: str) -> list[int]:
        """What a template made of messages that went through `guarded`; it writes the first token itself."""
        if GUARD not in rendered or self._any_marker is None:
            return list(self._engine.encode(rendered, add_special_tokens=False).ids)
        ids: list[int] = []
        start = 0
        for found in self._any_marker.finditer(rendered):
            ids += self._as_text(rendered[start : found.start()])
            ids.append(self._markers[found[0]])
            start = found.end()
        return ids + self._as_text(rendered[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; markers become nothing. Raises: Invalid: an id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self._size:
                raise Invalid(f"token id {token}: expected 0 to {self._size - 1}")
        return str(self._engine.decode(list(ids), skip_special_tokens=True))

    def _as_text(self, text: str) -> list[int]:
        self._engine.encode_special_tokens = True
        try:
            return list(self._engine.encode(text.replace(GUARD, ""), add_special_tokens=False).ids)
        finally:
            self._engine.encode_special_tokens = False


def _text_of(value: Any) -> str:
    """Of a token: its text, or an object that has it as content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _default_template(value: Any) -> str:
    """The template, or the one called default of several."""
    if isinstance(value, list):
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise Invalid(f"tokenizer_config.json's chat_template is a text, not {type(value).__name__}")
    return value or ""
