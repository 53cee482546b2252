"""How a worker does, in a file beside its run: any other process may read it, none has to ask the worker."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tessera.core.errors import Invalid, Missing
from tessera.training.home import write_atomic

__all__ = ["WorkerStatus", "read_status", "save_status"]

FILE = "status.json"


class WorkerStatus(BaseModel):
    """One moment of one worker. Times are seconds since 1970."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    name: str
    stage: int
    stages: int
    account: str
    time: float
    step: int
    steps: int
    tokens_per_step: int
    last_step: tuple[float, float] | None  # when the last one ended, how many seconds it took
    trouble: str  # why no session runs; empty while one does
    pauses: str  # why the worker itself does not work now
    leaving: bool
    companions: int  # other workers of our stage
    audits: bool  # whether the run's workers audit each other
    trained: bool
    settled: bool
    claimable: int  # units of income that wait for us
    stake: int = 0  # units that we have bonded
    bond: str = ""  # what is of them


def save_status(folder: Path, status: WorkerStatus) -> None:
    """Raises `OSError`."""
    write_atomic(folder / FILE, status.model_dump_json().encode())


def read_status(folder: Path) -> WorkerStatus:
    """Raises `Missing` when no worker ever ran here, `Invalid` for a damaged file."""
    try:
        return WorkerStatus.model_validate_json((folder / FILE).read_bytes())
    except FileNotFoundError as error:
        raise Missing(f"no worker has run in {folder}") from error
    except ValidationError as error:
        raise Invalid(f"{folder / FILE} is damaged: {error.errors()[0]['msg']}") from error
