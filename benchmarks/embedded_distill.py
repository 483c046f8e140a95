"""Distillation of the embedded base and its ablations, one `armillary distill` each, as one recorded table.

    python -m benchmarks.embedded_distill --output_dir runs/distill-table

Every arm changes one thing of embedded/distill.gin. A finished run is kept, an interrupted one resumed. Scores are on
captions that no arm was distilled on; differences are paired with the packaged student on the same captions and noise,
intervals are 95 %, clustered by caption.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from backbones.embedded.generator import packaged_generator
from framework.data.scenes import ShapesCaptions
from framework.data.shapes_controls import ShapesControls
from framework.evaluation import HeldOut
from framework.reporting.metrics import read_metrics
from framework.reporting.report import markdown_table
from framework.reporting.statistics import clustered_bootstrap
from framework.reporting.summary import control_lines, read_scores
from rewards.shapes import ShapesReward

PARTICIPATION = "distill.weights = @block_weights.FutureParticipation()"
ARMS: dict[str, tuple[str, ...]] = {
    "default": (),
    "history detached": ("distill.history_grad = False",),
    "weights α = −1": (PARTICIPATION, "block_weights.FutureParticipation.alpha = -1.0"),
    "weights α = +1": (PARTICIPATION, "block_weights.FutureParticipation.alpha = 1.0"),
    "clean history": (
        "HISTORY = @student_history.RealClips()",
        "student_history.RealClips.data = @world.PreferenceWorld()",
        "world.PreferenceWorld.held_out_count = 24",
    ),
    "update ratio 2": ("distill.generator_every = 2",),
}
"""What each arm binds beside the packaged configuration."""

HEADERS = ("arm", "seed", "student updates", "total [95 %]", "VQ", "MQ", "TA", "against the packaged [95 %]", "core-s")


@dataclass(frozen=True)
class Run:
    """One distillation of the table."""

    arm: str
    seed: int
    folder: Path


def launch(run: Run, extra: Sequence[str]) -> None:
    """Distil in a process of its own, its output in a log beside the folder."""
    if (run.folder / "gains.md").is_file():
        return
    log = run.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    bindings = [word for line in (*ARMS[run.arm], *extra) for word in ("--gin_param", line)]
    command = [sys.executable, "-m", "framework", "distill", "--gin_file", "embedded/distill.gin", *bindings,
               "--seed", str(run.seed), "--output_dir", str(run.folder)]  # fmt: skip
    with log.open("a") as out:  # an interrupted run goes on
        done = subprocess.run(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{run.arm}, seed {run.seed} failed, see {log}")


def interval(values: Tensor, sign: str = "") -> str:
    """mean [low, high] of values [captions, noises]."""
    mean, low, high = (format(x, f"{sign}.3f") for x in clustered_bootstrap(values))
    return f"{mean} [{low}, {high}]"


def row(name: str, seed: str, updates: str, scores: dict[str, Tensor], packaged: Tensor, cost: str) -> list[str]:
    """Cells of one set of scores, per signal [captions, noises]."""
    total = torch.stack(list(scores.values())).mean(0)
    parts = [f"{scores[name].mean():.3f}" for name in HEADERS[4:7]]
    return [name, seed, updates, interval(total), *parts, interval(total - packaged, "+"), cost]


def table(runs: Sequence[Run]) -> str:
    """The packaged student and the base first, then one row per run."""
    read = [read_scores(load_file(run.folder / "evaluation.safetensors")) for run in runs]
    base = read[0][0]
    captions, members = next(iter(base.values())).shape
    held = HeldOut(ShapesCaptions(held_out=True, limit=captions), ShapesReward(), members, controls=ShapesControls())
    packaged = held.judge(packaged_generator(), "judging the packaged student")
    rows = [
        row("packaged student", "", "", packaged.scores, packaged.total, ""),
        row("base, the start", "", "0", base, packaged.total, ""),
    ]
    for run, (_, after) in zip(runs, read, strict=True):
        last = [line for line in read_metrics(run.folder / "metrics.jsonl") if "train/student_updates" in line][-1]
        updates = f"{last['train/student_updates']:.0f}"
        cost = json.loads((run.folder / "summary.json").read_text())["training_core_s"]
        rows.append(row(run.arm, str(run.seed), updates, after, packaged.total, f"{cost:.0f}"))
    return "\n".join([markdown_table(rows, HEADERS), "", *control_lines(held)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of all runs; existing runs are kept")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--gin_param", action="append", default=[], help="one gin line for every run")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    root = Path(options.output_dir)
    place = list(ARMS)
    runs = [
        Run(arm, seed, root / f"{place.index(arm)}-{seed}") for arm in options.arms for seed in range(options.seeds)
    ]
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda run: launch(run, options.gin_param), runs))
    text = table(runs)
    (root / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"\nsaved to {root / 'table.md'}")


if __name__ == "__main__":
    main()
