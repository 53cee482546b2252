"""The manifest fixes a run: its SHA-256 is the run id, so nothing in it can change afterwards.

Everything that two workers must agree on stands here; everything that one worker may choose alone (device, threads,
folders) does not. Unknown fields are errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tessera.core import encoding
from tessera.core.errors import Invalid, Misbehaviour
from tessera.core.hashing import sha256
from tessera.core.ids import Account, BlobId, RunId, parse_account, parse_blob_id
from tessera.models.config import AveragingConfig, ModelSpec
from tessera.training.audit import AuditConfig

__all__ = [
    "CHECKPOINT_EVERY",
    "Allocation",
    "DataRecipe",
    "DataSet",
    "Manifest",
    "Owner",
    "Part",
    "Schedule",
    "Settlement",
    "load_manifest",
]

MANIFEST_LIMIT = 64 * 1024  # bytes
WHOLE_BPS = 10_000
SHARE_FLOPS = 10**12  # verified floating-point operations that earn the workers one share
SHARE_WAD = 10**18  # smallest units of one share
MAX_OWNERS = 64
MAX_WEIGHT = 1_000  # of a data set beside the others
MAX_RECEIPTS = 50_000  # of one epoch: they travel to every voter in one message
MAX_WORKERS = 128  # that a run contract takes
MOST_REPLICAS = 8
DAY_S = 86_400
CHECKPOINT_EVERY = 10  # steps

Positive = Annotated[int, Field(ge=1, le=10**9)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part(_Strict):
    """A share of every epoch that goes to `account` without work: a data owner's or the creator's."""

    account: str
    bps: Annotated[int, Field(ge=0, le=WHOLE_BPS)]

    @field_validator("account")
    @classmethod
    def _checksummed(cls, value: str) -> str:
        return _as_value_error(parse_account, value)


class Allocation(_Strict):
    """Who gets how much of each epoch's shares, in basis points that sum to 10,000."""

    work: Annotated[int, Field(ge=1, le=WHOLE_BPS)]
    data: Annotated[tuple[Part, ...], Field(max_length=MAX_OWNERS)]
    creator: Part

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = self.work + sum(part.bps for part in self.data) + self.creator.bps
        if total != WHOLE_BPS:
            raise ValueError(f"allocation sums to {total} basis points, expected {WHOLE_BPS}")
        return self


class DataSet(_Strict):
    """One owner's text: its index by blob id, and how much of the run it makes up."""

    index: str
    weight: Annotated[int, Field(ge=1, le=MAX_WEIGHT)]
    account: str
    description: Annotated[str, Field(max_length=200)] = ""

    @field_validator("index")
    @classmethod
    def _blob(cls, value: str) -> str:
        return _as_value_error(parse_blob_id, value)

    @field_validator("account")
    @classmethod
    def _checksummed(cls, value: str) -> str:
        return _as_value_error(parse_account, value)


class DataRecipe(_Strict):
    """Which text, by hash: data sets, mixed in proportion to their weights, all cut by one tokenizer.

    `active` shards of each set are mixed at once: more mix better, fewer need less disk.
    """

    tokenizer: str
    sets: Annotated[tuple[DataSet, ...], Field(min_length=1, max_length=MAX_OWNERS)]
    active: Annotated[int, Field(ge=1, le=64)] = 4

    @field_validator("tokenizer")
    @classmethod
    def _blob(cls, value: str) -> str:
        return _as_value_error(parse_blob_id, value)

    @model_validator(mode="after")
    def _once(self) -> Self:
        indexes = [part.index for part in self.sets]
        for index in indexes:
            if indexes.count(index) > 1:
                raise ValueError(f"data set {index[:16]}… is listed twice: raise its weight instead")
        return self

    @property
    def accounts(self) -> tuple[Account, ...]:
        """The owners of the sets, each once, in order."""
        return tuple(dict.fromkeys(Account(part.account) for part in self.sets))


class Settlement(_Strict):
    """What every worker puts at risk, and when an epoch of work becomes shares: the terms of the run's contract.

    A proposed epoch waits out `window_s`, in which a third of the workers can strike it. Who has left gets his bond
    back after `delay_s`. The weight of an epoch's work falls in equal steps from `early_bps` in the first to 10,000.
    """

    stake_units: Annotated[int, Field(ge=0, le=10**15)] = 0  # that each worker bonds, in the coin's smallest unit
    window_s: Annotated[int, Field(ge=0, le=30 * DAY_S)] = 0
    delay_s: Annotated[int, Field(ge=1, le=365 * DAY_S)] = DAY_S
    reward_bps: Annotated[int, Field(ge=0, le=WHOLE_BPS // 2)] = 0  # of a lost bond, to who showed the fault
    early_bps: Annotated[int, Field(ge=WHOLE_BPS, le=100 * WHOLE_BPS)] = WHOLE_BPS

    @model_validator(mode="after")
    def _bonds_outlast_the_window(self) -> Self:
        if self.delay_s <= self.window_s:
            raise ValueError(f"delay_s is {self.delay_s}, expected more than window_s, which is {self.window_s}")
        return self


class Schedule(_Strict):
    """How the work is cut: a step is `microbatches` of `sequences` windows of `length` tokens."""

    steps: Positive
    microbatches: Annotated[int, Field(ge=1, le=1024)]
    sequences: Annotated[int, Field(ge=1, le=1024)]
    length: Annotated[int, Field(ge=1, le=131_072)]
    evaluate_every: Positive
    evaluate_batches: Annotated[int, Field(ge=1, le=4096)]
    epoch_steps: Positive
    snapshot_every: Annotated[int, Field(ge=0, le=10**9)] = 100  # steps from one copy with others to the next; 0 = none
    drop_late: bool = False  # end a step without microbatches that are late; else every step has them all

    @field_validator("snapshot_every")
    @classmethod
    def _with_checkpoints(cls, value: int) -> int:
        if value % CHECKPOINT_EVERY:
            raise ValueError(
                f"copies are made of checkpoints: every so many times {CHECKPOINT_EVERY} steps, not {value}"
            )
        return value

    @property
    def epochs(self) -> int:
        return -(-self.steps // self.epoch_steps)

    def epoch_range(self, epoch: int) -> range:
        """The steps that epoch `epoch` pays for."""
        return range(epoch * self.epoch_steps, min((epoch + 1) * self.epoch_steps, self.steps))

    def epochs_due(self, steps_done: int) -> int:
        """How many epochs are complete after `steps_done` steps."""
        return self.epochs if steps_done >= self.steps else steps_done // self.epoch_steps


@dataclass(frozen=True, slots=True)
class Owner:
    """Somebody who owns a part of the model without computing: role `data` or `creator`."""

    account: Account
    role: Literal["data", "creator"]
    bps: int


class Manifest(_Strict):
    """One run, complete."""

    version: Literal[4] = 4
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w .:/+-]+$")]
    chain_id: Annotated[int, Field(ge=1, lt=2**53)]
    model: ModelSpec
    replicas: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = 1  # workers that each stage has before the run starts
    most_replicas: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = MOST_REPLICAS  # workers of one stage at any time
    data: DataRecipe
    schedule: Schedule
    averaging: AveragingConfig = AveragingConfig()
    audit: AuditConfig = AuditConfig()  # of stages with several workers; rate_bps 0: nobody is audited
    settlement: Settlement = Settlement()
    allocation: Allocation
    pay_to: str = "share"
    price_units: Annotated[int, Field(ge=0, le=10**15)]  # of an answer; 0: workers serve for nothing
    nonce: Annotated[str, Field(max_length=64)] = ""

    @field_validator("pay_to")
    @classmethod
    def _payee(cls, value: str) -> str:
        return value if value == "share" else _as_value_error(parse_account, value)

    @model_validator(mode="after")
    def _verifiable(self) -> Self:
        if self.model.stages < 2:
            raise ValueError("a run needs at least 2 stages: only a neighbour can sign receipts")
        if self.schedule.length > self.model.model.context:
            raise ValueError(
                f"windows of {self.schedule.length} tokens exceed the context of {self.model.model.context}"
            )
        receipts = self.receipts_per_step * min(self.schedule.epoch_steps, self.schedule.steps)
        if receipts > MAX_RECEIPTS:
            raise ValueError(f"an epoch would have {receipts} receipts, at most {MAX_RECEIPTS}: lower epoch_steps")
        return self

    @model_validator(mode="after")
    def _seats_fit(self) -> Self:
        if self.replicas > self.most_replicas:
            raise ValueError(f"{self.replicas} replicas to begin with, and at most {self.most_replicas}")
        if self.replicas * self.model.stages > MAX_WORKERS:
            raise ValueError(
                f"{self.model.stages} stages of {self.replicas} workers: a run contract takes {MAX_WORKERS} workers"
            )
        return self

    @model_validator(mode="after")
    def _auditors_exist(self) -> Self:
        if not self.audit.waived and (self.replicas < 2 or self.audit.rate_bps == 0):
            raise ValueError(
                f"audit.waived is false, so only audited work is paid: that needs replicas of 2 or more, not "
                f"{self.replicas}, and audit.rate_bps above 0, not {self.audit.rate_bps}"
            )
        return self

    @model_validator(mode="after")
    def _owners_are_paid(self) -> Self:
        """Data earns for those whose data it is, and for nobody else."""
        paid = [part.account for part in self.allocation.data]
        for account in paid:
            if paid.count(account) > 1:
                raise ValueError(f"allocation.data names {account} twice: add up the basis points")
        if unpaid := [account for account in self.data.accounts if account not in paid]:
            raise ValueError(f"allocation.data lacks {unpaid[0]}, who owns a data set (0 basis points are allowed)")
        if strangers := [account for account in paid if account not in self.data.accounts]:
            raise ValueError(f"allocation.data pays {strangers[0]}, who owns none of the data sets")
        return self

    def payee(self, share: Account) -> Account:
        """Who is paid by buyers: the share contract `share`, unless the manifest names another."""
        return share if self.pay_to == "share" else Account(self.pay_to)

    @property
    def canonical(self) -> bytes:
        return encoding.encode(self.model_dump(mode="json"))

    @property
    def run_id(self) -> RunId:
        return RunId(sha256(self.canonical).hex())

    @property
    def tokenizer(self) -> BlobId:
        return BlobId(self.data.tokenizer)

    @property
    def tokens_per_microbatch(self) -> int:
        return self.schedule.sequences * self.schedule.length

    @property
    def tokens_per_step(self) -> int:
        return self.schedule.microbatches * self.tokens_per_microbatch

    @property
    def receipts_per_step(self) -> int:
        """At most, when nothing is done twice: a microbatch takes one way through the workers of two stages."""
        ways = min(self.schedule.microbatches, self.most_replicas**2)
        return 2 * (self.model.stages - 1) * ways

    @property
    def owners(self) -> list[Owner]:
        parts = [Owner(Account(part.account), "data", part.bps) for part in self.allocation.data]
        creator = self.allocation.creator
        return [*parts, Owner(Account(creator.account), "creator", creator.bps)]

    @classmethod
    def parse(cls, data: bytes | str) -> Manifest:
        """From JSON in any layout. Raises `Invalid` naming the field that is wrong."""
        if len(data) > MANIFEST_LIMIT:
            raise Invalid(f"a manifest has at most {MANIFEST_LIMIT} bytes, this one {len(data)}")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise Invalid(f"the manifest is wrong: {_first_errors(error)}") from error


def load_manifest(data: bytes, expected: RunId) -> Manifest:
    """A manifest from a peer. Raises `Misbehaviour` when its hash is not the run id."""
    manifest = Manifest.parse(data)
    if manifest.run_id != expected:
        raise Misbehaviour(
            f"the manifest hashes to {manifest.run_id[:16]}…, expected {expected[:16]}…",
            evidence={"run_id": manifest.run_id},
        )
    return manifest


def _as_value_error(parse: Any, value: str) -> str:
    try:
        return str(parse(value))
    except Invalid as error:  # pydantic collects ValueErrors and says which field
        raise ValueError(error.message) from error


def _first_errors(error: ValidationError, most: int = 5) -> str:
    lines = []
    for item in error.errors()[:most]:
        where = ".".join(str(part) for part in item["loc"]) or "the whole"
        what = "unknown field" if item["type"] == "extra_forbidden" else item["msg"]
        lines.append(f"{where}: {what}")
    return "; ".join(lines)
