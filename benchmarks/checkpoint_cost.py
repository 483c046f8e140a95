"""What a checkpoint costs: seconds and bytes, of the demo's run and of a state as large as is asked for.

    python -m benchmarks.checkpoint_cost [--mib 1024]

Written, read back whole (every byte hashed) and decoded. Medians, in a folder of the current one, so of the disk that
runs are written to.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint import Checkpoints, read_part
from framework.config.load import load_config
from framework.policies import Policies
from framework.random_state import random_state
from framework.reporting.report import markdown_table
from framework.trainer import Trainer


def demo_trainer() -> Trainer:
    """The trainer of embedded/nft.gin after one step, which fills the optimiser's state."""
    given = load_config("train", gin_files=["embedded/nft.gin"]).build()
    policies = Policies(given["generator"], given["adaptation"], given["behaviour_decay"], 0.9, seed=0)
    trainer = Trainer(
        given["generator"], given["exploration"], given["surrogate"], given["reward"], given["advantage"],
        given["regularizer"], policies, given["optimizer"], given["scenes"].scenes(), frozenset(), seed=0,
        prompts_per_step=given["prompts_per_step"], updates_per_rollout=1, micro_batch_size=48,
    )  # fmt: skip
    trainer.step()
    return trainer


def seconds(work: Callable[[], Any], times: int) -> float:
    """Median wall-clock seconds of one call."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def row(name: str, state: dict[str, Any], times: int, step: str) -> list[str]:
    """Cells for one state."""
    with tempfile.TemporaryDirectory(dir=".", prefix=".checkpoint-cost-") as folder:
        checkpoints = Checkpoints(Path(folder))
        parts = {"shared": state, "rank-00000": {"random": random_state()}}
        numbers = iter(range(times))
        write = seconds(lambda: checkpoints.write(next(numbers), parts, ""), times)
        newest = checkpoints.folders()[-1]
        verify = seconds(lambda: checkpoints.verified(newest), times)
        read = seconds(lambda: read_part(newest / "shared.safetensors"), times)
        size = sum(path.stat().st_size for path in newest.iterdir()) / 2**20
    return [name, f"{size:.1f}", *(f"{value:.3f}" for value in (write, verify, read)), step]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the large state")
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer = demo_trainer()
    taken = seconds(trainer.step, 3)
    rows = [row("embedded/nft.gin", trainer.state_dict(), 4 * options.times, f"{taken:.2f}")]
    large = {"weights": [torch.randn(2**18) for _ in range(options.mib)]}
    rows.append(row(f"{options.mib} tensors of 1 MiB", large, options.times, ""))
    print(markdown_table(rows, ["state", "MiB", "write, s", "verify, s", "read, s", "a step, s"]))


if __name__ == "__main__":
    main()
