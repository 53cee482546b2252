"""Several processes behind one worker: rank 0 speaks, the others do the same at the same time.

torchrun starts the processes and tells each its rank. A command is eight integers, perhaps with bytes after them;
tensors follow from rank to rank. All of it is numbers and JSON, and nothing is pickled. These processes trust each
other: they are one owner's, and torchrun's rendezvous is not for the internet.

Invariants: while nothing is asked, rank 0 says so every `BEAT_S`, so that a follower that hears nothing for `timeout_s`
knows that rank 0 is gone; every wait ends after `timeout_s`; whatever breaks is `RankLost`, after which nothing can be
asked any more and the process should end: torchrun then starts all of them again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import anyio
import structlog
import torch
import torch.distributed as dist
from torch import Tensor

from tessera.core.errors import Invalid
from tessera.models.device import free_device_bytes, pick_device

__all__ = ["Order", "RankLink", "RankLost", "World", "named_failures", "parallel_world"]

log = structlog.get_logger()

TIMEOUT_S = 300.0  # longer than any one computation between two exchanges
BEAT_S = 5.0
HEADER = 8  # integers
REPLY_LIMIT = 2_000  # bytes of an error
MAX_RANKS = 4_096


class RankLost(RuntimeError):
    """A process behind this worker is gone or out of step. No `TesseraError`: trying again within it cannot help."""


class Order(IntEnum):
    """What rank 0 asks for; the integers after it are in the comment."""

    BEAT = 0
    FREE = 1  # how much memory is free on your device?
    BUILD = 2  # steps, shard, bytes; then the spec
    FORWARD = 3  # index, sequences, columns, keep; then rows
    BACKWARD = 4  # index, sequences, columns, again; then rows
    DROP = 5  # index
    FINISH = 6  # step, tokens
    CLEAR = 7
    EVALUATE = 8  # sequences, columns; then rows
    STATE = 9
    LOAD = 10
    PARAMETERS = 11
    SUMS = 12
    FINISH_WITH = 13  # step, tokens; then the sums
    STOP = 14
    ROTATE = 15  # decode, encode: whether that end turns


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that torchrun started for one worker."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    def device(self, name: str = "auto") -> str:
        """Each process on a host takes the GPU of its number; `cpu` is the processor for all of them."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= self.local_size else "cpu"
        if name == "cuda":
            return pick_device(f"cuda:{self.local_rank}")
        if name != "cpu":
            raise Invalid(f"several processes use auto, cpu or cuda, not {name!r}: torchrun gives each its own device")
        return name


def parallel_world(environ: Mapping[str, str] | None = None) -> World | None:
    """What torchrun told this process; None without torchrun, or when it started only one.

    Args:
        environ: None = this process's.

    Raises: Invalid: variables that contradict each other.
    """
    told = os.environ if environ is None else environ
    if "WORLD_SIZE" not in told:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, size, local_rank, local_size = (int(told.get(name, "")) for name in names)
    except ValueError as error:
        raise Invalid(f"torchrun sets {', '.join(names)} to numbers; found {_shown(told, names)}") from error
    if not (0 <= rank < size <= MAX_RANKS and 0 <= local_rank < local_size <= size):
        raise Invalid(f"no such process: {_shown(told, names)}")
    return World(rank, size, local_rank, local_size) if size > 1 else None


class RankLink:
    """One process's end. `with link:` opens it, and at rank 0 keeps the beat; at its end the others stop.

    Args:
        device: of this process, as `World.device` gives it.
        timeout_s: for every exchange.
    """

    def __init__(self, world: World, device: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.world, self.device, self.timeout_s = world, device, timeout_s
        self._turn = threading.RLock()
        self._over = threading.Event()
        self._failure: RankLost | None = None
        self._beat = threading.Thread(target=self._keep_beat, name="rank-beat", daemon=True)

    def __enter__(self) -> RankLink:
        if self.device != "cpu":
            torch.cuda.set_device(torch.device(self.device))
        with named_failures(f"the {self.world.size} processes did not find each other"):
            dist.init_process_group(
                "gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl",
                timeout=timedelta(seconds=self.timeout_s),
                rank=self.world.rank,
                world_size=self.world.size,
            )
            dist.all_reduce(torch.zeros(1))  # in RAM, so over gloo: everybody is here
        log.info("ranks_joined", rank=self.world.rank, ranks=self.world.size, device=self.device)
        if self.world.rank == 0:
            self._beat.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._over.is_set():
            return
        self._over.set()
        if self.world.rank == 0:
            self._beat.join(2 * BEAT_S)
            if self._beat.is_alive():  # it waits for a process that does not answer: nothing can be said any more
                log.error("rank_silent", waited_s=2 * BEAT_S)
                return
            if self._failure is None:
                self._last_word()
        if dist.is_initialized():
            dist.destroy_process_group()

    # --- rank 0 -----------------------------------------------------------------------------------------------------

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One order and all that belongs to it. Raises `RankLost` for whatever breaks inside, and from then on."""
        with self._turn:
            if self._failure is not None:
                raise self._failure
            try:
                with named_failures("the processes behind this worker fell out of step"):
                    yield
            except RankLost as error:
                self._failure = error
                log.error("rank_lost", reason=str(error))
                raise

    def order(self, order: Order, *numbers: int, data: bytes = b"") -> None:
        """Tell everybody. Within a `turn`."""
        header = torch.tensor([int(order), *numbers, *[0] * (HEADER - 2 - len(numbers)), len(data)])
        dist.broadcast(header, 0)
        if data:
            dist.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)

    async def watch(self) -> None:
        """Until cancelled; raises `RankLost` when a process is gone, even while nothing is asked of it."""
        while self._failure is None:
            await anyio.sleep(1.0)
        raise self._failure

    def _keep_beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                with self.turn():
                    self.order(Order.BEAT)
            except RankLost:
                return  # kept for whoever asks next, and for `watch`

    def _last_word(self) -> None:
        try:
            with self.turn():
                self.order(Order.STOP)
        except RankLost as error:  # it has stopped already, then
            log.info("rank_gone_before_the_end", reason=str(error))

    # --- the others -------------------------------------------------------------------------------------------------

    def hear(self) -> tuple[Order, list[int], bytes]:
        """The next order that is not a beat. Raises: RankLost: rank 0 is gone, or silent for `timeout_s`."""
        while True:
            header = torch.zeros(HEADER, dtype=torch.int64)
            with named_failures("rank 0 is gone"):
                dist.broadcast(header, 0)
                order, *numbers, size = (int(number) for number in header)
                data = torch.zeros(size, dtype=torch.uint8)
                if size:
                    dist.broadcast(data, 0)
            if order != Order.BEAT:
                return Order(order), numbers, data.numpy().tobytes()

    # --- both -------------------------------------------------------------------------------------------------------

    def send(self, tensor: Tensor, rank: int) -> None:
        dist.send(tensor.detach().to("cpu").contiguous(), rank)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, rank)
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's numbers into everybody's `tensor`, which lies in RAM."""
        dist.broadcast(tensor, 0)

    def total(self, value: float) -> float:
        """The sum over all ranks, the same on each."""
        number = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(number)
        return float(number)

    def reply(self, error: str) -> None:
        """From a follower to rank 0: empty when all is well."""
        data = error.encode()[:REPLY_LIMIT]
        self.send(torch.tensor([len(data)]), 0)
        if data:
            self.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0)

    def replies(self) -> list[str]:
        """At rank 0: what went wrong at the others; empty texts where nothing did."""
        texts = []
        for rank in range(1, self.world.size):
            size = min(REPLY_LIMIT, int(self.receive((1,), torch.int64, rank)))
            data = self.receive((size,), torch.uint8, rank) if size else torch.zeros(0, dtype=torch.uint8)
            texts.append(data.numpy().tobytes().decode(errors="replace"))
        return texts

    def least_free(self) -> int:
        """At rank 0: free bytes of the device that has least; processes that share a host's RAM share it evenly."""
        with self.turn():
            self.order(Order.FREE)
            others = [int(self.receive((1,), torch.int64, rank)) for rank in range(1, self.world.size)]
        return min(self.own_free(), *others)

    def own_free(self) -> int:
        free = free_device_bytes(self.device)
        return free // self.world.local_size if self.device == "cpu" else free


@contextmanager
def named_failures(what: str) -> Iterator[None]:
    """torch raises RuntimeError for a closed socket, a timeout and a wrong size alike."""
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        raise RankLost(f"{what}: {str(error)[:500]}") from error


def _shown(told: Mapping[str, str], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={told.get(name, '')[:20]!r}" for name in names)
