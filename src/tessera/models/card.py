"""What a served model is, as plain data: its shape, the file of each stage, and how it reads text. No torch here.

A card names blobs by their hashes, so whoever has its digest can fetch the model from anybody.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tessera.core import encoding
from tessera.core.errors import Invalid
from tessera.core.hashing import sha256
from tessera.core.ids import BlobId, parse_blob_id
from tessera.models.config import ModelSpec
from tessera.models.plain import Family
from tessera.models.plain_tokenizer import TEMPLATE_LIMIT, TokenizerFacts

__all__ = ["CARD_LIMIT", "MAX_ENDS", "NAME", "ModelCard", "StageFile"]

CARD_LIMIT = 1 << 20  # bytes
MAX_ENDS = 16  # tokens that end a text
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def _blob(value: str) -> str:
    try:
        return parse_blob_id(value)
    except Invalid as error:
        raise ValueError(error.message) from error


Blob = Annotated[str, AfterValidator(_blob)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StageFile(_Frozen):
    """The parameters of one stage; `tessera.models.stage_file` reads them."""

    blob: Blob
    size_bytes: int = Field(ge=1)
    params: int = Field(ge=1)


class ModelCard(_Frozen):
    """A model to serve."""

    format: Literal["tessera/model/1"] = "tessera/model/1"
    name: str = Field(pattern=NAME)
    family: Family
    spec: ModelSpec
    stages: tuple[StageFile, ...]
    tokenizer: Blob  # its tokenizer.json
    ends: tuple[int, ...] = Field(max_length=MAX_ENDS)  # tokens that end a text
    named: dict[str, str] = Field(max_length=8)  # see `TokenizerFacts`
    begins: bool | None = None
    template: str = Field(default="", max_length=TEMPLATE_LIMIT)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.stages) != self.spec.stages:
            raise ValueError(f"{len(self.stages)} files for {self.spec.stages} stages")
        if any(not 0 <= token < self.spec.model.vocab_size for token in self.ends):
            raise ValueError(f"ends {self.ends} are outside a vocabulary of {self.spec.model.vocab_size}")
        return self

    @property
    def canonical(self) -> bytes:
        return encoding.encode(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, 64 hex digits."""
        return sha256(self.canonical).hex()

    @property
    def params(self) -> int:
        return sum(stage.params for stage in self.stages)

    @property
    def size_bytes(self) -> int:
        return sum(stage.size_bytes for stage in self.stages)

    @property
    def blobs(self) -> list[BlobId]:
        """Everything that it names."""
        return [parse_blob_id(self.tokenizer), *(parse_blob_id(stage.blob) for stage in self.stages)]

    @property
    def facts(self) -> TokenizerFacts:
        return TokenizerFacts(self.named, self.begins, self.template)

    @classmethod
    def parse(cls, data: bytes) -> ModelCard:
        """Raises: Invalid naming the first wrong field."""
        value = encoding.decode(data, CARD_LIMIT)
        try:
            return cls.model_validate_json(encoding.encode(value))
        except ValidationError as error:
            first = error.errors()[0]
            raise Invalid(f"model card: {'.'.join(map(str, first['loc'])) or 'card'}: {first['msg']}") from error
