"""What the packaged generator is: its rewards between floors and ceiling, against its base, and over a long stream.

    python -m benchmarks.embedded_generator [--pretrained DIR]

DIR is a folder that `armillary pretrain --gin_file embedded/pretrain.gin` wrote; with it the few-step base is compared
and the packaged weights are held against the run's own.
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backbones.embedded.generator import PACKAGED, ShapesGenerator, packaged_generator
from framework.data.scenes import ShapesCaptions
from framework.data.shapes_controls import ShapesControls
from framework.evaluation import EvaluationResult, HeldOut, decode_tape, evaluate_policy, evaluation_plans
from framework.interfaces import StreamingGenerator
from framework.kernels import Consistency, Ode
from framework.records import Endpoints, Predictions
from framework.reporting.statistics import clustered_bootstrap
from framework.reporting.summary import control_lines, headroom, score_line
from framework.rollout import roll_out
from framework.schedules import FewStepSchedule
from framework.selfchecks import replay_deviation
from framework.types import VideoBatch
from rewards.shapes import ShapesReward


def compare(name: str, after: Tensor, before: Tensor) -> str:
    """One line: paired difference with its interval."""
    mean, low, high = clustered_bootstrap(after - before)
    return f"{name}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def few_euler_steps(generator: StreamingGenerator, steps: int) -> None:
    """Let a generator be sampled by ``steps`` Euler steps."""
    grid = tuple(round(1000 * (steps - i) / steps) for i in range(steps))
    generator.recipe = replace(generator.recipe, schedule=FewStepSchedule(grid))


@torch.no_grad()
def long_stream(generator: StreamingGenerator, held: HeldOut, blocks: int, span: int) -> list[Tensor]:
    """Total reward [scenes, members] of each ``span`` frames of a stream."""
    windows: list[list[Tensor]] = []
    for plan in evaluation_plans(held.scenes.scenes(), held.members, held.seed, blocks):
        tape = roll_out(generator, [plan], Consistency())
        frames = decode_tape(generator, tape).frames
        prompts = [s.prompt for s in tape.scenes]
        totals = []
        for first in range(0, frames.shape[1] - span + 1, span):
            clip = frames[:, first : first + span].float() / 127.5 - 1
            scores = held.reward.score(VideoBatch.from_signed(clip, generator.recipe.fps, prompts))
            totals.append(torch.stack(list(scores.values.values())).mean(0))
        windows.append(totals)
    return [torch.stack(column) for column in zip(*windows, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", type=Path, help="folder of a pretrain run, to compare with its base")
    parser.add_argument("--members", type=int, default=8, help="noises per caption")
    parser.add_argument("--captions", type=int, help="at most so many of the held-out captions")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    scenes = ShapesCaptions(held_out=True, limit=options.captions)
    held = HeldOut(scenes, ShapesReward(), members=options.members, controls=ShapesControls())
    generator = packaged_generator()
    print("\n".join(control_lines(held)))
    student = held.judge(generator)
    print(score_line("packaged start, 4 steps", student))
    print(f"room for RL, best of {options.members} minus mean: {headroom(student):.3f}")

    plans = evaluation_plans(held.scenes.scenes()[:2], 2, 0, 7)
    tape = roll_out(generator, plans, Consistency(), frozenset({Predictions, Endpoints}))
    print(f"packed replay against streaming rollout, relative deviation: {replay_deviation(generator, tape):.1e}")

    first, *middle, last = long_stream(generator, held, 21, 21)
    print(f"63-frame streams, total per 21 frames: {', '.join(f'{w.mean():.3f}' for w in (first, *middle, last))}")
    print(compare("frames 42–62 against frames 0–20", last, first))

    if options.pretrained is not None:
        report_base(options.pretrained, held, student)


def report_base(folder: Path, held: HeldOut, student: EvaluationResult) -> None:
    """The base of the run, and whether the packaged file is the run's own."""
    base = packaged_generator(str(folder / "base.safetensors"))
    four = held.judge(base)
    print(score_line("base, 4 steps", four))
    print(compare("packaged start against the 4-step base, paired", student.total, four.total))
    twin: ShapesGenerator = packaged_generator(str(folder / "base.safetensors"))
    few_euler_steps(twin, 24)
    print(score_line("base, 24 Euler steps", held_with(held, twin)))
    ours = Path(__file__).resolve().parents[1] / "backbones" / "embedded" / PACKAGED
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (ours, folder / PACKAGED)]
    print(f"sha256 packaged {digests[0]}, run {digests[1]}: {'equal' if len(set(digests)) == 1 else 'DIFFERENT'}")


def held_with(held: HeldOut, generator: StreamingGenerator) -> EvaluationResult:
    return evaluate_policy(generator, held.reward, held.scenes.scenes(), 2, held.seed, kernel=Ode())


if __name__ == "__main__":
    main()
