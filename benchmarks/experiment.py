"""What the recorded experiments share: seeds × arms, each an `armillary train` of its own, and one table of gains.

A run has one thread and two run at a time; one that is there is not repeated. Gains are paired (same captions, same
noise) on captions that RL never saw, intervals are clustered by caption.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from framework.data.scenes import ShapesCaptions
from framework.data.shapes_controls import ShapesControls
from framework.evaluation import HeldOut
from framework.reporting.report import gain_table, markdown_table
from framework.reporting.summary import control_lines, read_scores
from rewards.shapes import ShapesReward


@dataclass(frozen=True)
class Run:
    """One training run of the table."""

    arm: str
    config: str
    seed: int
    folder: Path


def launch(run: Run, extra: list[str]) -> None:
    """Train one run in a process of its own, its output in a log beside the folder."""
    if (run.folder / "gains.md").is_file():
        return
    log = run.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "framework", "train", "--gin_file", run.config, "--seed", str(run.seed),
               "--output_dir", str(run.folder), *extra]  # fmt: skip
    with log.open("w") as out:
        done = subprocess.run(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{run.arm}, seed {run.seed} failed, see {log}")


def rows(runs: list[Run], signals: tuple[str, ...]) -> list[list[str]]:
    """One row per run: gain of the total with its interval, gains of the signals in the given order, cost."""
    table = []
    for run in runs:
        before, after = read_scores(load_file(run.folder / "evaluation.safetensors"))
        gains = {gain.signal: gain for gain in gain_table(before, after)}
        total = gains["total"]
        facts = json.loads((run.folder / "summary.json").read_text())
        parts = [f"{g.gain:+.3f} [{g.low:+.3f}, {g.high:+.3f}]" for g in (gains[name] for name in signals)]
        table.append(
            [run.arm, str(run.seed), f"{total.before:.3f}", f"{total.after:.3f}",
             f"{total.gain:+.3f} [{total.low:+.3f}, {total.high:+.3f}]", *parts, f"{facts['training_core_s']:.0f}"]
        )  # fmt: skip
    return table


def run_experiment(description: str | None, arms: Mapping[str, str], argv: Sequence[str] | None = None) -> Path:
    """Train every arm with every seed, print and save the table; returns its path.

    arms: name → packaged configuration. description: of the command's ``--help``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of all runs; existing runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms), metavar="ARM")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--gin_param", action="append", default=[], help="one gin line for every run")
    options = parser.parse_args(argv)
    root = Path(options.output_dir)
    runs = [
        Run(arm, arms[arm], seed, root / f"{Path(arms[arm]).stem}-{seed}")
        for arm in options.arms
        for seed in range(options.seeds)
    ]
    extra = [word for line in options.gin_param for word in ("--gin_param", line)]
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda run: launch(run, extra), runs))
    signals = ShapesReward().signals
    headers = ["arm", "RL seed", "before", "after", "gain [95 %]", *signals, "core-s"]
    table = markdown_table(rows(runs, signals), headers)
    held = HeldOut(ShapesCaptions(held_out=True), ShapesReward(), controls=ShapesControls())
    before, _ = read_scores(load_file(runs[0].folder / "evaluation.safetensors"))
    total = torch.stack(list(before.values())).mean(0)
    room = (
        f"room of the start, best of {total.shape[1]} minus mean: {float((total.amax(1) - total.mean(1)).mean()):.3f}"
    )
    path = root / "table.md"
    path.write_text("\n".join([table, "", room, "", *control_lines(held), ""]), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    print(f"saved to {path}")
    return path
