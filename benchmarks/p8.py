"""P8: what it costs that several ranks train one policy.

a: two ranks over gloo, each with the prompts that one process would have: scores and gradients travel, statistics of
all clips are computed twice.
b: two processes at the same time that know nothing of each other, with the same work each.

Both use the machine alike, so the ratio of their core-seconds says what distribution costs whatever number of cores is
free: two ranks do 2 / ratio times the work of one, 1.8 is the goal, and so the ratio may be 1.11. Core-seconds leave
out how long ranks wait for each other; wall-clock, which has it, stands beside them, and so does that of one process
alone, which says whether two cores were free at all.
"""

import os
import socket
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import multiprocessing

from benchmarks.measure import Ratio, Row, Seconds, clock
from benchmarks.p1 import build_trainer
from benchmarks.scenarios import MIDDLE, random_generator
from framework.distributed import Distribution, World, join

RANKS = 2


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def step_times(
    world: World, config: Mapping[str, Any], prompts: int, group: int, blocks: int, steps: int
) -> tuple[float, float]:
    """Medians of core-seconds and wall-clock of a step, after two that are not measured."""
    trainer = build_trainer(random_generator(config), prompts * world.size, group, blocks, world=world)
    trainer.step()
    times = []
    for _ in range(steps):
        world.most(0)  # start together
        times.append(clock(trainer.step))
    return statistics.median(t.core for t in times), statistics.median(t.wall for t in times)


def _rank(rank: int, port: int, joined: bool, results: Any, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    world = join(Distribution(timeout_s=300.0), "cpu") if joined else World()
    results.put(step_times(world, *arguments))
    results.close()
    results.join_thread()
    os._exit(0)  # a forked process leaves the teardown to the one that it came from


def side_by_side(processes: int, joined: bool, arguments: tuple) -> Seconds:
    """A step of some processes at the same time: the most of any. Raises RuntimeError where one fails."""
    forked = multiprocessing.get_context("fork")
    results, port = forked.Queue(), free_port()
    started = [forked.Process(target=_rank, args=(rank, port, joined, results, arguments)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError(f"a process of P8 ended with {[process.exitcode for process in started]}")
    core, wall = (max(column) for column in zip(*(results.get() for _ in started), strict=True))
    return Seconds(core, wall)


def measure(
    config: Mapping[str, Any] = MIDDLE, prompts: int = 1, group: int = 4, blocks: int = 2, pairs: int = 5,
    steps: int = 3,
) -> list[Row]:  # fmt: skip
    """Row P8."""
    arguments = (config, prompts, group, blocks, steps)
    joined = partial(side_by_side, RANKS, True, arguments)
    apart = partial(side_by_side, RANKS, False, arguments)
    ratio = Ratio(tuple((joined(), apart()) for _ in range(pairs)))
    alone = side_by_side(1, False, arguments).wall
    return [
        Row(
            "P8",
            f"{RANKS} ranks over gloo / {RANKS} processes apart, the same work each",
            ratio.median,
            RANKS / 1.8,
            ratio.spread,
            note=f"{ratio.note}; one process alone {alone:.2f} s",
        )
    ]
