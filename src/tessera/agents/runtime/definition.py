"""An agent in one file, `agent.toml`: who it is, which model it asks, which tools it has, what it may pay under.

Unknown keys are errors, paths are relative to the file, and no secret stands in it: an API key is named by the variable
that holds it, the purse's key lies in the keyring beside.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tessera.agents.tools import Effect, Role
from tessera.core.errors import Invalid, Missing

__all__ = ["Definition", "KnownPart", "ModelPart", "ServerPart", "ToolPart", "WalletPart", "read_definition"]

FILE_LIMIT = 262_144  # bytes


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelPart(_Part):
    """Which model: an OpenAI-compatible `url` and its `name`, or a `script` that is said line by line."""

    url: str = ""
    name: str = ""
    api_key_env: str = ""  # the variable that holds the key
    pay_most: int = Field(default=0, ge=0)  # units for one request, where the endpoint asks for money (x402)
    script: str = ""  # a JSON file


class KnownPart(_Part):
    """What is known of a tool; see `agents.tools`."""

    effect: Effect | None = None
    roles: dict[str, Role] = Field(default_factory=dict)
    author: str = "outside"
    text: list[str] = Field(default_factory=list)
    directory: bool = False
    kind: str = ""
    identity: bool = False
    balance: bool = False
    paid: list[str] = Field(default_factory=list)
    preload: bool = False  # called without arguments before the model says anything
    repeatable: bool = False


class ToolPart(KnownPart):
    python: str  # "file.py:function" or "package.module:function"


class ServerPart(_Part):
    name: str
    command: list[str] = Field(default_factory=list)
    url: str = ""
    environment: list[str] = Field(default_factory=list)  # names of variables that its process gets
    tools: dict[str, KnownPart] = Field(default_factory=dict)


class GuardPart(_Part):
    me: list[str] = Field(default_factory=list)
    plan: Literal["request", "none"] = "request"
    forbid: str = ""  # a file of Cedar policies
    questions: int = Field(default=8, ge=0, le=100)


class WalletPart(_Part):
    """Made by `tessera agent new --chain`: where the purse is and what the coin's signatures are made for."""

    chain: str  # JSON-RPC URL
    coin_name: str
    coin_version: str
    mandate: str = "mandate.json"


class LimitsPart(_Part):
    requests: int = Field(default=50, ge=1, le=1_000)
    tool_timeout_s: float = Field(default=60.0, gt=0, le=3_600)
    model_timeout_s: float = Field(default=330.0, gt=0, le=3_600)
    result_bytes: int = Field(default=262_144, ge=1_000, le=2**22)


class Definition(_Part):
    """The whole file."""

    name: str
    instructions: str = ""
    memory: bool = False
    approver: str = ""  # whose signature allows what the guard asks about
    database: str = "agents.sqlite"  # a file, or postgresql://…
    model: ModelPart
    tools: list[ToolPart] = Field(default_factory=list)
    servers: list[ServerPart] = Field(default_factory=list)
    guard: GuardPart = Field(default_factory=GuardPart)
    wallet: WalletPart | None = None
    limits: LimitsPart = Field(default_factory=LimitsPart)


def read_definition(file: Path) -> Definition:
    """Raises: Missing without a file; Invalid, naming the key, for one that cannot be used."""
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_LIMIT + 1)
    except FileNotFoundError as error:
        raise Missing(f"there is no {file}: `tessera agent new` makes one") from error
    except OSError as error:
        raise Invalid(f"cannot read {file}: {error.strerror}") from error
    if len(data) > FILE_LIMIT:
        raise Invalid(f"{file} is longer than {FILE_LIMIT} bytes: it defines no agent")
    try:
        return Definition.model_validate(tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"{file} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise Invalid(f"{file}: {where}: {first['msg'].lower()}") from error
