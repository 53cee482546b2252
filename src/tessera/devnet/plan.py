"""What `tessera up` was asked for, and the manifest that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from tessera.core.errors import Invalid
from tessera.core.ids import Account
from tessera.devnet.text import VALIDATION_WINDOWS, Text
from tessera.models.config import ModelSpec
from tessera.models.device import fast_compute
from tessera.models.presets import DEFAULT_BATCH, Compute, Kind, default_spec
from tessera.p2p.engines import Engine
from tessera.training.manifest import (
    MAX_WORKERS,
    MOST_REPLICAS,
    WHOLE_BPS,
    Allocation,
    DataRecipe,
    DataSet,
    Manifest,
    Part,
    Schedule,
    Settlement,
)

__all__ = ["UpConfig", "make_manifest"]

EPOCHS = 4  # payout periods in a run
EVALUATIONS = 10  # validation points on the curve
PLAY_SETTLEMENT = Settlement(stake_units=1_000_000, window_s=2, delay_s=60)  # 1 tUSD each; a show, not a safeguard
MAX_RELAYS = 8  # as many as an invitation names


@dataclass(frozen=True)
class UpConfig:
    """One economy on one machine. Defaults run in two to three minutes on two cores."""

    state_dir: Path
    data: Path | None = None  # a folder of text; None = the sources of Python's standard library
    steps: int = 0  # optimiser steps; 0 = the preset's
    stages: int = 4
    replicas: int = 1  # workers of each stage
    codec: Kind = "codec"
    host: str = "127.0.0.1"  # address that page, gateway and JSON-RPC listen on
    port: int = 8402  # page and gateway; JSON-RPC one above; peers on UDP of the same number; 0 = any free ones
    seats: int = 0  # left to others who join by invitation
    chain_url: str | None = None  # JSON-RPC of an EVM network; None = the embedded chain
    once: bool = False  # end after one round of payments
    requests: int = 6  # paid requests of the first buyer
    price_units: int = 10_000  # of the coin's smallest unit, for each request: 0.01 tUSD
    name: str = "tessera-py"
    bind: str = ""  # address of the peer link; "" = loopback, or every address when seats are open
    manifest: Path | None = None  # run this manifest instead of the preset; its stages, steps and data then count
    relays: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # URL and token ("" = none), best first
    database: str = field(default="", repr=False)  # URL of every table; "" = SQLite files in the state directory
    engine: Engine = "iroh"  # of the links; zmq inside a network of one's own
    blobs: str = field(default="", repr=False)  # fsspec URL where data and tokenizers lie; "" = the state directory
    settlement: Settlement = PLAY_SETTLEMENT  # what each worker bonds, and how long an epoch can be disputed
    serving_bps: int = 0  # of income, to the workers who serve; 0 = all of it belongs to the shares
    own_workers: int | None = None  # worker processes started here; None = for every seat that is not left open

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= MAX_WORKERS:
            raise Invalid(f"{self.replicas} replicas: 1 to {MAX_WORKERS} expected")
        if not 0 <= self.serving_bps < WHOLE_BPS or (self.serving_bps and self.manifest is not None):
            raise Invalid(f"serving_bps is 0 to {WHOLE_BPS - 1}, and 0 with a manifest, which names its own payee")
        if not 0 <= self.seats <= self.stages * self.replicas:
            raise Invalid(f"{self.seats} open seats of {self.stages * self.replicas}")
        if self.stages < 2:
            raise Invalid(f"a run needs at least 2 stages, not {self.stages}: only a neighbour can sign receipts")
        if self.steps < 0 or not 0 <= self.port <= 65_534:
            raise Invalid(f"steps {self.steps} and port {self.port} must be in range")
        if self.own_workers is not None and not 0 <= self.own_workers <= MAX_WORKERS:
            raise Invalid(f"{self.own_workers} own workers: 0 to {MAX_WORKERS} expected")
        if self.own_workers is not None and self.manifest is None:
            self.workers(self.stages * self.replicas)
        self._check_manifest()
        self._check_relays()
        if self.database and "://" not in self.database:  # it may hold a password: not shown
            raise Invalid("a database is a URL such as postgresql://user@host/name or sqlite:////path/to/file")

    def workers(self, seats: int) -> int:
        """How many of the seats that a run begins with this machine takes. Raises `Invalid` for more than those."""
        own = seats - self.seats if self.own_workers is None else self.own_workers
        if not 0 <= own <= seats:
            raise Invalid(f"{own} own workers for {seats} seats")
        return own

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        if self.data is not None:
            raise Invalid("give either data or a manifest: a manifest names its own data sets")
        if not self.manifest.is_file():
            raise Invalid(f"no manifest at {self.manifest}")

    def _check_relays(self) -> None:
        if len(self.relays) > MAX_RELAYS:
            raise Invalid(f"{len(self.relays)} relays, at most {MAX_RELAYS} expected")
        for url, _ in self.relays:
            if not url.startswith(("http://", "https://")):
                raise Invalid(f"a relay is a URL such as https://relay.example, not {url[:60]!r}")


def make_manifest(config: UpConfig, text: Text, *, chain_id: int, data_owner: Account, creator: Account) -> Manifest:
    """The run that `config` describes on this text. Equal arguments give an equal run id.

    Raises: Invalid when the numbers do not fit the model, naming the field.
    """
    batch = DEFAULT_BATCH
    steps = config.steps or batch.steps
    spec = _spec(config, text)
    manifest = Manifest(
        name=config.name,
        chain_id=chain_id,
        model=spec,
        replicas=config.replicas,
        most_replicas=max(MOST_REPLICAS, config.replicas),
        data=DataRecipe(
            tokenizer=text.tokenizer,
            sets=(DataSet(index=text.index, weight=1, account=data_owner, description=text.source[:200]),),
        ),
        schedule=Schedule(
            steps=steps,
            microbatches=batch.microbatches,
            sequences=batch.sequences,
            length=batch.length,
            evaluate_every=max(1, steps // EVALUATIONS),
            evaluate_batches=max(1, VALIDATION_WINDOWS // batch.sequences),
            epoch_steps=-(-steps // EPOCHS),
        ),
        settlement=config.settlement,
        allocation=Allocation(
            work=8_500, data=(Part(account=data_owner, bps=1_000),), creator=Part(account=creator, bps=500)
        ),
        price_units=config.price_units,
    )
    return Manifest.parse(manifest.canonical)


def _spec(config: UpConfig, text: Text) -> ModelSpec:
    """The preset, computing in bfloat16 where this machine is fast at it and nobody else takes part."""
    compute: Compute = "float32" if config.seats else fast_compute()
    try:
        return default_spec(config.stages, codec=config.codec, compute=compute, vocab_size=text.vocab_size)
    except ValidationError as error:
        raise Invalid(f"no model of {config.stages} stages: {error.errors()[0]['msg']}") from error
