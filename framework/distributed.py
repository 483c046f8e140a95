"""Several ranks as one: which rank this is, who does what of a step, and what ranks tell each other.

A rank takes whole prompts of the same global draw. Scores are gathered, so every rank computes the same advantages and
marks of all clips; losses are divided by the active clips of the whole step; gradients are summed once an update. So an
update does not depend on how many ranks made it, beyond the order of sums. Every rank has equally many prompts: where
they do not come out even, the last is repeated with weight 0, so that all ranks make the same calls in the same order,
which sharded weights need.

A plain process is a `World` of one rank: every method returns at once what it was given.
"""

import functools
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.tensor import DTensor

from framework.devices import local_device
from framework.types import Advantage, GroupPlan, Scores, Tape

Item = TypeVar("Item")
P = ParamSpec("P")
R = TypeVar("R")
BUCKET = 2**26
"""Gradient entries that are summed in one call."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and ``accelerate launch`` tell each process."""


class RanksDiverged(RuntimeError):
    """Ranks that must hold the same do not."""


@dataclass(frozen=True)
class Distribution:
    """How the ranks of a job work together; acts only where torchrun started several.

    timeout_s: how long a rank waits for the others before the job ends; longer than the slowest thing that ranks do
    apart, a rollout or an evaluation. checksum_every: steps between comparisons of all policies over the ranks, 0 for
    the start of the run only. shard_base: FSDP2, each rank keeps its part of the weights; adapters, their optimiser and
    the averaged policies stay whole on every rank, those of `FullFineTuning` are sharded too.
    """

    timeout_s: float = 1800.0
    checksum_every: int = 50
    shard_base: bool = False

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"Distribution.timeout_s must be positive, got {self.timeout_s}")
        if self.checksum_every < 0:
            raise ValueError(f"Distribution.checksum_every must be 0 or more, got {self.checksum_every}")


@dataclass(frozen=True)
class Share:
    """What one rank does of a step.

    plans: its groups, equally many on every rank. rows: which of the step's clips its clips are [n]. counted: False
    for a clip that another rank or place counts already [n]; such a clip has weight 0.
    """

    plans: tuple[GroupPlan, ...]
    rows: Tensor
    counted: Tensor

    def of(self, advantage: Advantage) -> Advantage:
        """The advantages of its clips. A repeated group has an id of its own: nobody is its own sibling."""
        groups = Tape(self.plans, {}).groups
        return Advantage(advantage.values[self.rows], advantage.active[self.rows] & self.counted, groups)


@dataclass(frozen=True)
class World:
    """The ranks of a job, seen from one of them. device: of the tensors that are reduced."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def describe(self, prompts: int) -> list[str]:
        """One line for the start of a run of several ranks."""
        each = -(-prompts // self.size)
        spare = each * self.size - prompts
        uneven = f", {spare} of them repeated with weight 0 (prompts_per_step={prompts} does not come out even)"
        return [f"ranks: {self.size} × {each} prompts{uneven if spare else ''}"] if self.size > 1 else []

    def own(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part: a run of ⌈n / size⌉ items, the last item repeated where there are not enough."""
        each = -(-len(items) // self.size)
        return [items[min(i, len(items) - 1)] for i in range(self.rank * each, (self.rank + 1) * each)]

    def share(self, plans: Sequence[GroupPlan]) -> Share:
        """This rank's groups of a step, whole ones, so that every objective sees all siblings of a clip."""
        each, branches = -(-len(plans) // self.size), len(plans[0].branches)
        places = range(self.rank * each, (self.rank + 1) * each)
        taken = self.own(range(len(plans)))
        own = tuple(
            plans[i] if place < len(plans) else replace(plans[i], group=-1 - place)
            for place, i in zip(places, taken, strict=True)
        )
        rows = torch.tensor([i * branches + b for i in taken for b in range(branches)])
        counted = torch.tensor([place < len(plans) for place in places for _ in range(branches)])
        return Share(own, rows, counted)

    def gather(self, rows: Tensor, count: int | None = None) -> Tensor:
        """Equally many rows of every rank [n, …], in the order of ranks, without what is beyond ``count``."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)[:count]

    def gather_on_first(self, rows: Tensor, count: int) -> Tensor | None:
        """`gather` for what only rank 0 writes, e.g. videos; None on the others."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)] if self.first else None
        dist.gather(rows.contiguous(), parts, dst=0)
        return torch.cat(parts)[:count] if parts is not None else None

    def gather_scores(self, scores: Scores, count: int) -> Scores:
        """The scores of all clips of the step, from those of every rank's share; signals in one order on all ranks."""
        if self.size == 1:
            return scores
        # of one kind on all ranks: what stands for a failed reward knows neither its device nor its dtype
        values = {name: value.to("cpu", torch.float32) for name, value in scores.values.items()}
        windows: dict[str, Tensor] = {}
        for name, value in values.items():
            # a rank whose reward failed has no windows, and still has to take part
            own = scores.windows.get(name, value.new_empty(len(value), 0)).to(value)
            if width := self.most(own.shape[1]):
                windows[name] = self.gather(widened(own, width), count)
        return Scores(
            {name: self.gather(value, count) for name, value in values.items()},
            {name: self.gather(scores.valid[name].to("cpu", torch.uint8), count).bool() for name in values},
            windows,
        )

    def sum_update(
        self, metrics: Mapping[str, Tensor | float], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor | float]:
        """Sum gradients, in place, and metrics over the ranks. A parameter without a gradient on any rank keeps none.

        Sums, not means: each rank has divided by the counts of the whole step. Gradients of sharded parameters were
        summed in the backward pass.
        """
        if self.size == 1:
            return dict(metrics)
        parameters = {name: p for name, p in parameters.items() if not isinstance(p, DTensor)}
        names = sorted(metrics)
        table = torch.stack([torch.as_tensor(metrics[name]).to(self.device, torch.float64) for name in names])
        reached = torch.tensor([p.grad is not None for p in parameters.values()], dtype=torch.float64)
        table = torch.cat([table, reached.to(self.device)])
        dist.all_reduce(table)
        anywhere = table[len(names) :].tolist()
        for bucket in buckets([p for p, ranks in zip(parameters.values(), anywhere, strict=True) if ranks]):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            dist.all_reduce(flat)
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)
        return dict(zip(names, table[: len(names)], strict=True))

    def most(self, value: int) -> int:
        """The largest of a number over the ranks."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def broadcast_text(self, text: str) -> str:
        """What the first rank says; the text of the others does not matter."""
        if self.size == 1:
            return text
        said = list(text.encode()) if self.first else []
        letters = torch.tensor(said + [0] * (self.most(len(said)) - len(said)), dtype=torch.uint8)
        dist.broadcast(letters, src=0)
        return bytes(letters.tolist()).decode()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so, e.g. that it was asked to stop; every rank hears the same."""
        return bool(self.most(int(flag)))

    def check_equal(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Compare tensors bit for bit over the ranks. Raises RanksDiverged that names the first one that differs.

        A sharded tensor is no copy of another rank's and is left out.
        """
        tensors = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
        if self.size == 1 or not tensors:
            return
        mine = torch.stack([fingerprint(tensor) for tensor in tensors.values()]).to(self.device)
        table = self.gather(mine[None])
        differs = (table != table[0]).any(0)
        if bool(differs.any()):
            first = int(differs.nonzero()[0])
            ranks = (table[:, first] != table[0, first]).nonzero().squeeze(1).tolist()
            raise RanksDiverged(
                f"{what}: {int(differs.sum())} of {len(tensors)} tensors differ between ranks, first "
                f"{list(tensors)[first]!r}, where ranks {ranks} hold something else than rank 0; the ranks no longer "
                f"train one policy: go back to the last checkpoint"
            )

    def check_text(self, text: str, what: str) -> None:
        """Raises RanksDiverged where a rank was given another text, e.g. another configuration."""
        self.check_equal({what: torch.tensor(list(hashlib.blake2b(text.encode()).digest()))}, what)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its part of one that is sharded over the ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Every rank has to ask for one that is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def any_sharded(state: Any) -> bool:
    """Whether a state of nested dicts, lists and tuples holds a sharded tensor."""
    if isinstance(state, Mapping):
        return any(any_sharded(value) for value in state.values())
    return any(map(any_sharded, state)) if isinstance(state, list | tuple) else isinstance(state, DTensor)


def widened(windows: Tensor, width: int) -> Tensor:
    """[N, W] with columns of NaN up to ``width``: another rank's clips have more windows."""
    return torch.cat([windows, windows.new_full((len(windows), width - windows.shape[1]), torch.nan)], dim=1)


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype and at most `BUCKET` entries (or one parameter)."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        entries = sum(p.numel() for p in bucket) + parameter.numel()
        if bucket and (entries > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Σ_i (2i + 1) b_i mod 2⁶⁴ over the bits b_i of a tensor's entries: int64 scalar; one changed entry changes it."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().flatten().view(sizes[tensor.dtype.itemsize]).long()
    return (bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum()


def ranks_started() -> int:
    """How many processes the launcher started; 1 without one. Raises ValueError for half an environment."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) < 1:
        raise ValueError(f"the environment variable WORLD_SIZE must be a number of processes, got {size!r}")
    if int(size) > 1:
        missing = [name for name in ENVIRONMENT if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE={size} but the environment lacks {', '.join(missing)}; start the ranks with torchrun "
                f"or accelerate launch"
            )
    return int(size)


def current_world() -> World:
    """The job that this process joined, or a world of its own."""
    if not dist.is_initialized():
        return World()
    device = f"cuda:{torch.cuda.current_device()}" if "nccl" in str(dist.get_backend_config()) else "cpu"
    return World(dist.get_rank(), dist.get_world_size(), device)


def join(distribution: Distribution, device: str) -> World:
    """Meet the other ranks. Raises ValueError for a device that ranks cannot share work on."""
    kind = torch.device(local_device(device))
    if kind.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: several ranks work on cpu (gloo) or cuda (NCCL)")
    if kind.type == "cuda":
        torch.cuda.set_device(kind)
    # tensors on the host travel by gloo in either case: scores, and videos that rank 0 writes
    backend = "gloo" if kind.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=distribution.timeout_s))
    return current_world()


def on_every_rank(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command with the arguments ``distribution`` and ``device`` run as one rank of a job.

    A rank that fails shows its traceback first and leaves it for torchrun, which ends the other ranks. It does not
    take its leave of them: that could wait for a collective that will never be.
    """

    @functools.wraps(command)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        if ranks_started() == 1 or dist.is_initialized():
            return command(*arguments, **named)
        distribution, device = named.get("distribution"), named.get("device", "cpu")
        get_error_handler().initialize()
        try:
            join(distribution if isinstance(distribution, Distribution) else Distribution(), str(device))
            result = command(*arguments, **named)
        except Exception as error:
            rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
            print(f"rank {rank} of {size} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            if "TORCHELASTIC_ERROR_FILE" in os.environ:
                get_error_handler().record_exception(error)
            raise
        dist.destroy_process_group()
        return result

    return run
