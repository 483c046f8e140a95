"""The reward-hacking laboratory: what a KL saves of the truth when the reward can be hacked, at the same proxy.

    python -m benchmarks.hacking_lab --output_dir runs/hacking-lab

The policy is trained on a proxy that noise, flicker and colour pay for, with a little text alignment; it is judged by
the ground truth (mean of VQ, MQ, TA) on captions that RL never saw. One run a mode, weight and seed, two at a time; a
run that is there is not repeated. A mode is a curve (proxy, truth) over its weights λ, which begins at the run without
a KL. Modes are compared where their curves have the same proxy: linear between neighbouring λ, seed by seed, clip by
clip; intervals are clustered by caption.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.experiment import Run, launch
from framework.reporting.metrics import read_metrics
from framework.reporting.report import markdown_table
from framework.reporting.statistics import clustered_bootstrap
from framework.reporting.summary import read_scores

UNIFORM, SELECTIVE = "velocity_kl.VelocityKL.weight", "selective_kl.SelectiveKL.weight"
PAYING = 4
"""A masked mode is run at so many times the weight of the uniform one: a quarter of the clips pay."""


@dataclass(frozen=True)
class Mode:
    """A regularizer. parameter: what its weight is called. factor: on the weights of the grid."""

    config: str
    parameter: str
    factor: float = 1.0


NONE = "embedded/lab.gin"
MODES = {
    "uniform": Mode("embedded/lab_uniform.gin", UNIFORM),
    "selective": Mode("embedded/lab_selective.gin", SELECTIVE, PAYING),
    "random mask": Mode("embedded/lab_random.gin", SELECTIVE, PAYING),
    "inverted sign": Mode("embedded/lab_inverted.gin", SELECTIVE, PAYING),
}
BASELINE = "uniform"
TRUTH = ("VQ", "MQ", "TA")


@dataclass(frozen=True)
class Point:
    """Held-out scores of one trained policy. proxy: the mean. truth: per clip [captions, members]."""

    weight: float
    proxy: float
    truth: Tensor


Curve = Sequence[Point]
"""Points of one mode and seed in the order of their weights, the run without a KL first."""


def truth_at(curve: Curve, proxy: float) -> Tensor:
    """Truth per clip where a curve first passes a proxy, linear between neighbours.

    Raises ValueError where it never does.
    """
    for left, right in pairwise(curve):
        if min(left.proxy, right.proxy) <= proxy <= max(left.proxy, right.proxy) and left.proxy != right.proxy:
            share = (left.proxy - proxy) / (left.proxy - right.proxy)
            return (1 - share) * left.truth + share * right.truth
    raise ValueError(f"no part of the curve passes a proxy of {proxy:.3f}; add weights to the grid")


def common_levels(curves: Sequence[Curve], count: int) -> list[float]:
    """Proxies that all curves pass, evenly spaced inside their common range. Raises ValueError where it is empty."""
    low = max(min(point.proxy for point in curve) for curve in curves)
    high = min(max(point.proxy for point in curve) for curve in curves)
    if low >= high:
        raise ValueError(f"the curves have no proxy in common ({low:.3f} … {high:.3f}); add weights to the grid")
    return [low + (high - low) * (i + 0.5) / count for i in range(count)]


def compare(curves: Mapping[str, Sequence[Curve]], proxy: float, resamples: int = 10_000) -> list[list[str]]:
    """One row a mode: its truth at a proxy and the paired difference to the baseline, and that of every seed."""
    at = {mode: [truth_at(curve, proxy) for curve in seeds] for mode, seeds in curves.items()}
    rows = []
    for mode, seeds in at.items():
        differences = [seed - base for seed, base in zip(seeds, at[BASELINE], strict=True)]
        mean, low, high = clustered_bootstrap(torch.cat(differences, 1), resamples=resamples)
        cells = ["–", "–"]
        if mode != BASELINE:
            by_seed = " ".join(f"{float(d.mean()):+.3f}" for d in differences)
            cells = [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]", by_seed]
        truth = torch.stack([seed.mean() for seed in seeds]).mean()
        rows.append([f"{proxy:.3f}", mode, f"{float(truth):.3f}", *cells])
    return rows


def read_point(folder: Path, weight: float) -> Point:
    """The trained policy of a run."""
    _, after = read_scores(load_file(folder / "evaluation.safetensors"))
    return Point(weight, float(after["proxy"].mean()), torch.stack([after[name] for name in TRUTH]).mean(0))


def point_row(mode: str, weight: float, folders: Sequence[Path]) -> list[str]:
    """Means over the seeds of one mode and weight."""
    after = [read_scores(load_file(folder / "evaluation.safetensors"))[1] for folder in folders]
    mean = {name: float(torch.stack([scores[name].mean() for scores in after]).mean()) for name in after[0]}
    truth = sum(mean[name] for name in TRUTH) / len(TRUTH)
    paid = [read_metrics(folder / "metrics.jsonl")[-2].get("train/kl_penalised") for folder in folders]
    known = [value for value in paid if value is not None]
    seconds = [json.loads((folder / "summary.json").read_text())["training_core_s"] for folder in folders]
    shown = [f"{mean['proxy']:.3f}", f"{truth:.3f}", *(f"{mean[name]:.3f}" for name in TRUTH)]
    kl = f"{sum(known) / len(known):.4f}" if known else "–"
    return [mode, f"{weight:g}", *shown, kl, f"{sum(seconds) / len(seconds):.0f}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder of all runs; existing runs are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.003, 0.01, 0.03], help="λ of the uniform KL")
    parser.add_argument("--levels", type=int, default=3, help="how many proxies the modes are compared at")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--gin_param", action="append", default=[], help="one gin line for every run")
    options = parser.parse_args(argv)
    root, seeds = Path(options.output_dir), range(options.seeds)
    modes = {name: mode for name, mode in MODES.items() if name in {BASELINE, *options.modes}}
    free = {seed: root / f"lab-{seed}" for seed in seeds}
    folders = {
        (name, base, seed): root / f"{Path(mode.config).stem}-{base:g}-{seed}"
        for name, mode in modes.items() for base in sorted(options.weights) for seed in seeds
    }  # fmt: skip
    shared = [word for line in options.gin_param for word in ("--gin_param", line)]
    work = [(Run("no KL", NONE, seed, folder), shared) for seed, folder in free.items()]
    for (name, base, seed), folder in folders.items():
        weighed = ["--gin_param", f"{modes[name].parameter} = {base * modes[name].factor}"]
        work.append((Run(name, modes[name].config, seed, folder), [*weighed, *shared]))
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda job: launch(*job), work))

    rows = [point_row("no KL", 0, list(free.values()))]
    for name, mode in modes.items():
        for base in sorted(options.weights):
            rows.append(point_row(name, base * mode.factor, [folders[name, base, seed] for seed in seeds]))
    headers = ["mode", "λ", "proxy", "truth", *TRUTH, "KL of those who pay", "core-s"]
    lines = [markdown_table(rows, headers), "", f"compared at equal proxy, difference to {BASELINE} [95 %]:", ""]
    curves = {
        name: [
            [read_point(free[seed], 0.0), *(read_point(folders[name, b, seed], b) for b in sorted(options.weights))]
            for seed in seeds
        ]
        for name in modes
    }
    try:
        matched = [
            row
            for level in common_levels([curve for group in curves.values() for curve in group], options.levels)
            for row in compare(curves, level)
        ]
        lines.append(markdown_table(matched, ["proxy", "mode", "truth", "difference", "seed by seed"]))
    except ValueError as error:
        lines.append(f"not compared: {error}")
    text = "\n".join([*lines, ""])
    (root / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"saved to {root / 'table.md'}")


if __name__ == "__main__":
    main()
