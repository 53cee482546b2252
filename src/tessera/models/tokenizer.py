"""Byte-level BPE: every text has an encoding, and decoding an encoding gives the text back.

Training is deterministic: the same texts in the same order give the same bytes. Token 0 is `END`, which separates
documents and ends a generation; it never comes out of ordinary text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _Engine
from tokenizers.decoders import ByteLevel as _ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from tessera.core.errors import Invalid
from tessera.core.hashing import sha256

__all__ = ["END", "Tokenizer", "train_tokenizer"]

END = 0
_END_TEXT = "<|end|>"
_MIN_VOCAB = 257  # every byte and END
_MAX_VOCAB = 2**20  # of a tokenizer that somebody else trained; we train up to 65,536
_SIZE_LIMIT = 32 * 2**20  # bytes of a tokenizer's JSON


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._engine.encode_special_tokens = True  # "<|end|>" in a text is text

    @property
    def vocab_size(self) -> int:
        return int(self._engine.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Many texts at once, on the engine's own threads."""
        encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, END becomes nothing.

        Raises: Invalid: an id outside the vocabulary.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise Invalid(f"token id {token}: expected 0 to {self.vocab_size - 1}")
        return str(self._engine.decode(list(ids), skip_special_tokens=True))

    def to_bytes(self) -> bytes:
        return str(self._engine.to_str()).encode()

    def plain_files(self) -> dict[str, bytes]:
        """What other programs read this tokenizer from."""
        facts = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _END_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        return {"tokenizer.json": self.to_bytes(), "tokenizer_config.json": json.dumps(facts, indent=2).encode()}

    def digest(self) -> str:
        """SHA-256 of `to_bytes`, 64 hex digits."""
        return sha256(self.to_bytes()).hex()

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        """Reads `to_bytes`. Raises: Invalid: too large, not a tokenizer, or not one of ours."""
        if len(data) > _SIZE_LIMIT:
            raise Invalid(f"a tokenizer of {len(data)} bytes: at most {_SIZE_LIMIT} expected")
        try:
            facts = json.loads(data)
            kinds = (facts["model"]["type"], facts["pre_tokenizer"]["type"], facts["decoder"]["type"])
            engine = _Engine.from_str(data.decode())
        except Exception as error:  # the engine raises bare Exception for every bad file
            raise Invalid(f"not a tokenizer: {str(error)[:200]}") from error
        if kinds != ("BPE", "ByteLevel", "ByteLevel") or engine.token_to_id(_END_TEXT) != END:
            raise Invalid(f"not a byte-level BPE tokenizer with {_END_TEXT} as token {END}")
        if engine.get_vocab_size() > _MAX_VOCAB:
            raise Invalid(f"a vocabulary of {engine.get_vocab_size()} tokens: at most {_MAX_VOCAB} expected")
        return cls(engine)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns at most `vocab_size` tokens; little text gives fewer. Raises: Invalid: fewer than 257 or over 65,536."""
    if not _MIN_VOCAB <= vocab_size <= 65_536:
        raise Invalid(f"a byte-level vocabulary has {_MIN_VOCAB} to 65536 tokens, not {vocab_size}")
    engine = _Engine(BPE())
    engine.pre_tokenizer = ByteLevel(add_prefix_space=False)
    engine.decoder = _ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(engine)
