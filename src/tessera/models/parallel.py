"""One stage on several devices or hosts: neighbours see one worker, and get the same bytes as from one process.

    torchrun --nproc-per-node 2 -m tessera join …

Rank 0 is the worker: it alone talks to the network, packs, unpacks, saves and loads. Each microbatch's sequences are
dealt to the ranks in order, every rank computes its own, and rank 0 puts the results together; gradients are summed
over the ranks once a step. So messages and losses follow from the same sums as in one process, in another order where
sums run over sequences: parameters and losses agree to about 1e-6, and a first forward to the bit.

    replicate   every rank holds the stage. For stages that fit into one device
    shard       every rank holds a part of each tensor (FSDP2). For stages that do not fit

Invariants: ranks see the same orders in the same sequence; an error that `StageTrainer` names is raised at rank 0 and
leaves all ranks as they were together; whatever else breaks is `RankLost`, and ends the process. All ranks should have
devices of one kind: replicas that round differently would drift apart.

Legend: B sequences, T tokens, W message width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar, cast, get_args

import structlog
import torch
from torch import Tensor

from tessera.core.encoding import encode
from tessera.core.errors import Invalid, TesseraError
from tessera.models.config import AveragingConfig, ModelSpec, parse_spec
from tessera.models.device import choose_graphs
from tessera.models.engine import Inputs, LocalEngine
from tessera.models.memory import in_flight_depth
from tessera.models.parallel_link import Order, RankLink, RankLost, named_failures
from tessera.models.parallel_place import Replicas, Shards
from tessera.models.stage import Stage
from tessera.models.trainer import StageTrainer

__all__ = ["LeadEngine", "Parallel", "build_trainer", "run_follower", "share_of"]

log = structlog.get_logger()

T = TypeVar("T")

_ENDS = ("decode", "encode")  # of a codec, in the order in which ranks speak of them

Parallel = Literal["auto", "replicate", "shard"]


def build_trainer(
    spec: ModelSpec,
    stage: int,
    *,
    steps: int,
    sequences: int,
    length: int,
    microbatches: int,
    device: str,
    limit_bytes: int = 0,
    link: RankLink | None = None,
    parallel: Parallel = "auto",
    averaging: AveragingConfig | None = None,
) -> StageTrainer:
    """The trainer of `stage` on this device, or on all that `link` joins; with as many graphs as fit.

    Args:
        sequences, length, microbatches: of the run's schedule.
        limit_bytes: most that the owner lends of each device's memory; 0 = what is free.
        parallel: auto keeps whole copies while they fit, then shards.
        averaging: how this stage's replicas stay together; None: the defaults.

    Raises: Invalid: no such stage, or it does not fit, naming what is needed and what is there.
    """
    if parallel not in get_args(Parallel):
        raise Invalid(f"parallel is one of {', '.join(get_args(Parallel))}, not {parallel!r}")

    def graphs(shard: bool, free: int, ranks: int) -> int:
        return choose_graphs(
            spec, stage, sequences=sequences, length=length, microbatches=microbatches, device=device,
            limit_bytes=free, ranks=ranks, shard=shard,
        )  # fmt: skip

    if link is None:
        kept = graphs(False, limit_bytes, 1)
        return StageTrainer(spec, stage, steps=steps, device=device, graphs=kept, averaging=averaging)
    ranks, least = link.world.size, link.least_free()
    free = min(least, limit_bytes or least)
    if sequences < ranks:
        log.warning("ranks_without_work", ranks=ranks, sequences=sequences)
    depth = in_flight_depth(microbatches)
    shard, kept = _choose_mode(parallel, depth, lambda shard: graphs(shard, free, ranks))
    log.info("ranks_share_stage", stage=stage, ranks=ranks, mode="shard" if shard else "replicate", graphs=kept)
    engine = LeadEngine(link, spec, stage, steps, shard)
    return StageTrainer(spec, stage, steps=steps, graphs=kept, engine=engine, averaging=averaging)


def _choose_mode(parallel: Parallel, depth: int, graphs: Callable[[bool], int]) -> tuple[bool, int]:
    """(shard, graphs). Copies that keep all `depth` graphs are fastest, then shards with as many as fit."""
    if parallel != "auto":
        return parallel == "shard", graphs(parallel == "shard")
    try:
        if graphs(False) == depth:
            return False, depth
    except Invalid:  # a copy does not fit at all
        pass
    return True, graphs(True)


def share_of(sequences: int, rank: int, size: int) -> tuple[slice, float]:
    """The sequences that `rank` computes, and 1; or, when there are too few for all, the first one, and 0.

    A rank without work computes as well, because sharded layers need everybody; what it computes counts for nothing.
    """
    base, extra = divmod(sequences, size)
    start = rank * base + min(rank, extra)
    stop = start + base + (rank < extra)
    return (slice(start, stop), 1.0) if stop > start else (slice(0, 1), 0.0)


class LeadEngine:
    """Rank 0's engine: everything that it is asked, all ranks do."""

    def __init__(self, link: RankLink, spec: ModelSpec, stage: int, steps: int, shard: bool) -> None:
        self._link, self._spec, self._size, self._shard = link, spec, link.world.size, shard
        data = encode({"spec": spec.model_dump(mode="json"), "stage": stage})
        with link.turn():
            link.order(Order.BUILD, steps, int(shard), data=data)
            self._local: LocalEngine = self._together(lambda: _build(link, spec, stage, steps, shard))
        self.stage = self._local.stage
        self._entering = 0 if self.stage.first else spec.message_width
        self._shapes: dict[int, tuple[int, int]] = {}  # of the ids of microbatches whose backward is to come
        self._leaving = 0 if self.stage.last else spec.message_width

    def forward(self, index: int, tokens: Tensor, message: Tensor | None, *, keep: bool) -> Tensor | float:
        with self._link.turn():
            self._link.order(Order.FORWARD, index, *tokens.shape, int(keep))
            self._deal(tokens, message)
            rows, part = share_of(tokens.size(0), 0, self._size)
            own = self._together(
                lambda: self._local.forward(index, tokens[rows], _rows(message, rows), keep=keep, part=part)
            )
            self._shapes[index] = (tokens.size(0), tokens.size(1))
            return own if isinstance(own, float) else self._collect(own, self._shapes[index], self._leaving)

    def backward(self, index: int, gradient: Tensor | None, again: Inputs | None) -> Tensor | None:
        with self._link.turn():
            shape = self._shapes.pop(index)
            self._link.order(Order.BACKWARD, index, *shape, int(again is not None))
            if again is not None:
                self._deal(*again)
            self._deal(gradient)
            rows, _ = share_of(shape[0], 0, self._size)
            inputs = None if again is None else (again[0][rows], _rows(again[1], rows))
            own = self._together(lambda: self._local.backward(index, _rows(gradient, rows), inputs))
            if own is None:
                return None
            return self._collect(own, shape, self._entering)

    def evaluate(self, tokens: Tensor, message: Tensor | None) -> Tensor | float:
        with self._link.turn():
            self._link.order(Order.EVALUATE, *tokens.shape)
            self._deal(tokens, message)
            rows, part = share_of(tokens.size(0), 0, self._size)
            own = self._together(lambda: self._local.evaluate(tokens[rows], _rows(message, rows), part=part))
            return own if isinstance(own, float) else self._collect(own, tuple(tokens.shape), self._leaving)

    def drop(self, index: int) -> None:
        with self._link.turn():
            self._link.order(Order.DROP, index)
            self._together(lambda: self._local.drop(index))
            self._shapes.pop(index, None)

    def finish(self, step: int, tokens: int) -> None:
        with self._link.turn():
            self._link.order(Order.FINISH, step, tokens)
            self._together(lambda: self._local.finish(step, tokens))

    def sums(self) -> dict[str, Tensor]:
        with self._link.turn():
            self._link.order(Order.SUMS)
            return self._together(self._local.sums)

    def finish_with(self, step: int, tokens: int, sums: Mapping[str, Tensor]) -> None:
        with self._link.turn():
            self._link.order(Order.FINISH_WITH, step, tokens)
            self._together(lambda: self._local.finish_with(step, tokens, sums))

    def clear(self) -> None:
        with self._link.turn():
            self._link.order(Order.CLEAR)
            self._together(self._local.clear)
            self._shapes.clear()

    def layout(self) -> dict[str, Tensor]:
        return self._local.layout()

    def state(self) -> dict[str, Tensor]:
        with self._link.turn():
            self._link.order(Order.STATE)
            return self._together(self._local.state)

    def load(self, state: dict[str, Tensor]) -> None:
        with self._link.turn():
            self._link.order(Order.LOAD)
            self._together(lambda: self._local.load(state))

    def rotate(self, turns: Mapping[str, Tensor]) -> None:
        with self._link.turn():
            self._link.order(Order.ROTATE, *(int(end in turns) for end in _ENDS))
            self._together(lambda: self._local.rotate(turns))

    def whole_stage(self) -> Stage:
        """Rank 0's own copy; of a sharded stage, a new one, as it is now."""
        if not self._shard:
            return self._local.stage
        with self._link.turn():
            self._link.order(Order.PARAMETERS)
            found = self._together(self._local.whole_parameters)
        stage = Stage(self._spec, self.stage.index)
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                parameter.copy_(found[name])
        return stage.to(self._link.device)

    def _deal(self, *tensors: Tensor | None) -> None:
        """Each of the others gets its sequences of each tensor."""
        for rank in range(1, self._size):
            for tensor in tensors:
                if tensor is not None:
                    self._link.send(tensor[share_of(tensor.size(0), rank, self._size)[0]], rank)

    def _collect(self, own: Tensor, shape: tuple[int, ...], width: int) -> Tensor:
        """All sequences in order, in RAM. `shape` is the ids': B, T + 1."""
        parts = [own.detach().to("cpu")]
        for rank in range(1, self._size):
            rows, part = share_of(shape[0], rank, self._size)
            found = self._link.receive((rows.stop - rows.start, shape[1] - 1, width), torch.float32, rank)
            parts += [found] if part else []
        return torch.cat(parts)

    def _together(self, act: Callable[[], T]) -> T:
        """Rank 0's part, then everybody's word that theirs went as well or failed alike."""
        error: TesseraError | None = None
        result: T | None = None
        try:
            result = act()
        except TesseraError as failure:
            error = failure
        replies = self._link.replies()
        if error is not None and all(replies):
            raise error
        wrong = [f"rank {rank}: {text}" for rank, text in enumerate(replies, 1) if text]
        if error is not None or wrong:
            raise RankLost("; ".join([*wrong, f"rank 0: {error}" if error else "rank 0: no error"]))
        return cast(T, result)


class _Follower:
    """What a rank other than 0 does. Each method answers one order, replies, and sends what rank 0 collects."""

    def __init__(self, link: RankLink) -> None:
        self._link = link
        self._engine: LocalEngine | None = None

    def obey(self, order: Order, numbers: list[int], data: bytes) -> None:
        if order is Order.FREE:
            self._link.send(torch.tensor([self._link.own_free()]), 0)
        elif order is Order.BUILD:
            self._try(lambda: self._build(numbers[0], bool(numbers[1]), data))
        elif order is Order.FORWARD:
            self._forward(*numbers[:4])
        elif order is Order.BACKWARD:
            self._backward(*numbers[:4])
        elif order is Order.EVALUATE:
            self._evaluate(*numbers[:2])
        else:
            engine = self._present()
            acts: dict[Order, Callable[[], object]] = {
                Order.DROP: lambda: engine.drop(numbers[0]),
                Order.FINISH: lambda: engine.finish(numbers[0], numbers[1]),
                Order.SUMS: engine.sums,
                Order.FINISH_WITH: lambda: engine.finish_with(numbers[0], numbers[1], None),
                Order.CLEAR: engine.clear,
                Order.STATE: engine.state,
                Order.LOAD: lambda: engine.load(None),
                Order.PARAMETERS: engine.whole_parameters,
                Order.ROTATE: lambda: engine.rotate({e: None for e, yes in zip(_ENDS, numbers, strict=False) if yes}),
            }
            self._try(acts[order])

    def _build(self, steps: int, shard: bool, data: bytes) -> None:
        self._engine = None  # before the next one takes its memory
        told = json.loads(data)
        self._engine = _build(self._link, parse_spec(told["spec"]), told["stage"], steps, shard)

    def _forward(self, index: int, sequences: int, columns: int, keep: int) -> None:
        engine, (rows, part) = self._present(), self._share(sequences)
        tokens, message = self._take_inputs(rows, columns)
        out = self._try(lambda: engine.forward(index, tokens, message, keep=bool(keep), part=part))
        if isinstance(out, Tensor):
            self._link.send(out, 0)

    def _backward(self, index: int, sequences: int, columns: int, again: int) -> None:
        engine, (rows, part) = self._present(), self._share(sequences)
        inputs = self._take_inputs(rows, columns) if again else None
        width = 0 if engine.stage.last else engine.stage.spec.message_width
        gradient = self._link.receive((rows, columns - 1, width), torch.float32, 0) if width else None
        if gradient is not None:
            gradient *= part
        out = self._try(lambda: engine.backward(index, gradient, inputs))
        if out is not None:
            self._link.send(out, 0)

    def _evaluate(self, sequences: int, columns: int) -> None:
        engine, (rows, part) = self._present(), self._share(sequences)
        tokens, message = self._take_inputs(rows, columns)
        out = self._try(lambda: engine.evaluate(tokens, message, part=part))
        if isinstance(out, Tensor):
            self._link.send(out, 0)

    def _try(self, act: Callable[[], T]) -> T | None:
        """What rank 0 hears of it: nothing, or the error that it should have met as well."""
        try:
            result = act()
        except TesseraError as error:
            self._link.reply(f"{error.code}: {error.message}")
            return None
        self._link.reply("")
        return result

    def _take_inputs(self, rows: int, columns: int) -> Inputs:
        stage = self._present().stage
        tokens = self._link.receive((rows, columns), torch.int64, 0)
        if stage.first:
            return tokens, None
        return tokens, self._link.receive((rows, columns - 1, stage.spec.message_width), torch.float32, 0)

    def _share(self, sequences: int) -> tuple[int, float]:
        rows, part = share_of(sequences, self._link.world.rank, self._link.world.size)
        return rows.stop - rows.start, part

    def _present(self) -> LocalEngine:
        if self._engine is None:
            raise RankLost("rank 0 asks for work before it has said of which stage")
        return self._engine


def run_follower(link: RankLink) -> None:
    """Do what rank 0 asks, until it stops. For every rank but 0, inside `with link:`.

    Raises: RankLost: rank 0 is gone. End the process then: torchrun starts all of them again.
    """
    follower = _Follower(link)
    while True:
        order, numbers, data = link.hear()
        if order is Order.STOP:
            log.info("rank_stopped", rank=link.world.rank)
            return
        with named_failures("the processes behind this worker fell out of step"):
            follower.obey(order, numbers, data)


def _build(link: RankLink, spec: ModelSpec, stage: int, steps: int, shard: bool) -> LocalEngine:
    place = Shards if shard else Replicas
    return LocalEngine(place(Stage(spec, stage), steps, link))


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
