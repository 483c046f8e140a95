"""What the tests of several ranks share: processes that meet over gloo, and recipes that train in float64 there.

Processes are forked, so nothing is imported again and a job of four takes a second or two. What the number of ranks
changes, the order of sums, stays in float64 twelve digits below everything else; in float32 it would be blown up where
Adam divides a gradient that is nearly zero by itself.
"""

import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from framework import rollout
from framework.adapters import LoRA
from framework.advantages import PerRewardCentred, PrimaryOnly
from framework.anchored_advantages import AnchorCentred
from framework.compatibility import check_recipe
from framework.distributed import Distribution, World, join
from framework.optimization import AdamW, Constant
from framework.policies import Policies
from framework.raven_advantages import RavenAdvantage
from framework.reference import Dynamic
from framework.trainer import Trainer
from framework.types import Scene
from rewards.shapes import ShapesReward
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.branch_kl import BranchKL
from strategies.regularizers.none import NoRegularizer
from strategies.regularizers.selective_kl import SelectiveKL
from strategies.surrogates import nft
from strategies.surrogates.gaussian_kernel import GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT
from strategies.surrogates.transitions import OneRandomStep, TrainedSteps
from tests.support import PROMPTS, Brightness, normal, tiny_generator

TIMEOUT = 20.0
"""Seconds that a rank waits for the others."""


@dataclass(frozen=True)
class Outcome:
    """How a rank ended. seconds: after the start of the job."""

    code: int
    seconds: float
    result: Any
    error: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    size: int, folder: Path, task: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT
) -> list[Outcome]:
    """``task(world, *arguments)`` on every rank of a job; what each returned, or its traceback.

    Started again where another process took the port between its choice and the first rank's listening.
    """
    for attempt in range(3):
        outcomes = _run_ranks(size, folder / str(attempt), task, *arguments, timeout=timeout)
        if not any("EADDRINUSE" in outcome.error for outcome in outcomes):
            break
    return outcomes


def _run_ranks(size: int, folder: Path, task: Callable[..., Any], *arguments: Any, timeout: float) -> list[Outcome]:
    folder.mkdir(parents=True, exist_ok=True)
    port, started = free_port(), time.monotonic()
    forked = multiprocessing.get_context("fork")
    processes = [
        forked.Process(target=_rank, args=(rank, size, port, folder, timeout, task, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    ended: dict[int, float] = {}
    while len(ended) < size and time.monotonic() - started < 3 * timeout + 30:
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                ended[rank] = time.monotonic() - started
        time.sleep(0.01)
    for process in processes:
        process.kill()  # what hangs until here never ended
        process.join()
    outcomes = []
    for rank, process in enumerate(processes):
        file, log = folder / f"{rank}.pt", folder / f"{rank}.txt"
        outcomes.append(
            Outcome(
                process.exitcode or 0,
                ended.get(rank, float("inf")),
                torch.load(file, weights_only=True) if file.is_file() else None,
                log.read_text() if log.is_file() else "",
            )
        )
    return outcomes


def _rank(
    rank: int, size: int, port: int, folder: Path, timeout: float, task: Callable[..., Any], arguments: tuple
) -> None:
    """One process of a job, as torchrun would start it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ARMILLARY_PROGRESS": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    code = 0
    try:
        world = join(Distribution(timeout_s=timeout), "cpu") if size > 1 else World()
        torch.save(task(world, *arguments), folder / f"{rank}.pt")
        if size > 1:
            dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        code = 1
    os._exit(code)  # no teardown of what belongs to the tests' process


def results(size: int, folder: Path, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What every rank returned; AssertionError with the traceback of one that failed."""
    outcomes = run_ranks(size, folder, task, *arguments)
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"rank {rank} of {size}: {outcome.error or 'ended without a word'}"
    return [outcome.result for outcome in outcomes]


class MovedLoRA(LoRA):
    """LoRA with B away from zero, so that every gradient has the size that it has in the middle of a run."""

    def attach(self, network: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        parameters = super().attach(network, seed)
        for i, parameter in enumerate(parameters.values()):
            parameter.data += 0.02 * normal(i, *parameter.shape).float()
        return parameters


class WideLoRA(MovedLoRA):
    """The same in float64."""

    def attach(self, network: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        parameters = super().attach(network, seed)
        for parameter in parameters.values():
            parameter.data = parameter.data.double()
        return parameters


class Noting(AdamW):
    """AdamW that notes the gradients of each update."""

    noted: list[dict[str, Tensor]]

    def step(self, optimizer, named, update, terms=None):
        self.noted.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        return super().step(optimizer, named, update, terms)


def noting(rate: float = 1e-3) -> Noting:
    optimizer = Noting(rate)
    object.__setattr__(optimizer, "noted", [])
    return optimizer


ROUTES = CausalHistoryRouting(
    group_size=3, routed_frames=2, recent=2, sink=1, routed_blocks=2, tail_blocks=1, stream_blocks=6
)
RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "nft": lambda: {
        "exploration": NoiseEndpoint(4), "surrogate": NFT(level_weights=(0, 1, 1, 1)), "advantage": PerRewardCentred(),
        "regularizer": NoRegularizer(),
    },
    "kvpo": lambda: {
        "exploration": ROUTES, "surrogate": GibbsTVE(), "advantage": AnchorCentred(), "regularizer": BranchKL(10.0),
        "updates_per_rollout": 2,
    },
    "raven": lambda: {
        "exploration": NoiseEndpoint(4), "surrogate": GaussianReinforce(TrainedSteps(OneRandomStep())),
        "advantage": RavenAdvantage(), "regularizer": NoRegularizer(),
    },
    "astrolabe": lambda: {
        "exploration": NoiseEndpoint(4), "surrogate": NFT(level_weights=(0, 1, 1, 1)),
        "advantage": PrimaryOnly("bright"), "regularizer": SelectiveKL("bright", ("red",), weight=0.5),
        "reference": Dynamic(threshold=1e-6), "reward": Brightness(),
    },
}  # fmt: skip


def draw_wide(*arguments: Any) -> Tensor:
    return rollout_draw(*arguments).double()


rollout_draw = rollout.draw_noise


def make(recipe: str, world: World, **changes: Any) -> Trainer:
    """A trainer of a recipe in float64, two branches or more for each of four prompts a step."""
    rollout.draw_noise = nft.draw_noise = draw_wide  # only in this process: it was forked
    generator = tiny_generator(torch.float64, clip_blocks=2)
    fields: dict[str, Any] = {
        "generator": generator, "reward": ShapesReward(), "optimizer": noting(),
        "policies": Policies(generator, WideLoRA(4), Constant(0.0), 0.9, seed=0),
        "scenes": tuple(Scene.single(prompt) for prompt in PROMPTS), "seed": 0, "prompts_per_step": 4,
        "updates_per_rollout": 1, "micro_batch_size": 48, "world": world, "checksum_every": 1,
    } | RECIPES[recipe]() | changes  # fmt: skip
    parts = [fields[name] for name in ("exploration", "surrogate", "advantage", "regularizer")]
    return Trainer(**fields, keep=check_recipe(*parts))


def train(world: World, recipe: str, steps: int = 2, **changes: Any) -> dict[str, Any]:
    """Metrics, gradients and parameters of some steps."""
    trainer = make(recipe, world, **changes)
    metrics = [trainer.step() for _ in range(steps)]
    assert isinstance(trainer.optimizer, Noting)
    return {
        "metrics": [{k: float(v) for k, v in m.items() if not k.startswith("time/")} for m in metrics],
        "gradients": trainer.optimizer.noted,
        "tensors": {name: value.detach().clone() for name, value in trainer.policies.tensors().items()},
        "samples_seen": trainer.samples_seen,
    }
