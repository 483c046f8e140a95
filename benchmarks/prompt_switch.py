"""Whether the packaged generator turns when its prompt does: text alignment after a switch, under both prompts.

    python -m benchmarks.prompt_switch [--scenes 24] [--members 8]

An object moves one way for 21 frames and is then told to move another way for 21 more. TA of the last 18 frames (the
first block after the switch is left out) is measured under both prompts, for each way to treat the stored past.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator, packaged_generator
from backbones.recache import BlockwiseRecache, JointRecache, MovedSinkRecache, NoRecache, Recache
from framework.data.scenes import ShapesSwitches
from framework.evaluation import decode_tape, evaluation_plans
from framework.kernels import Consistency
from framework.reporting.statistics import clustered_bootstrap
from framework.rollout import roll_out
from framework.types import Scene, VideoBatch, Window
from rewards.shapes import ShapesReward

BLOCKS, SWITCH, SEED = 14, 21, 20260
RECACHES: tuple[Recache, ...] = (NoRecache(), JointRecache(), BlockwiseRecache(), MovedSinkRecache())


def alignment(videos: VideoBatch, scenes: Sequence[Scene], first: int, segment: int) -> Tensor:
    """TA [N] of the frames from ``first`` on, each clip under a segment of its scene."""
    windows = tuple((Window(first, videos.frames.shape[1], scene.segments[segment].prompt),) for scene in scenes)
    return ShapesReward().score(VideoBatch(videos.frames, videos.fps, windows)).values["TA"]


@torch.no_grad()
def turned(generator: ShapesGenerator, scenes: Sequence[Scene], members: int) -> dict[str, Tensor]:
    """TA [scenes, members] after the switch under the new and the old prompt, and before it under its own."""
    rows: dict[str, list[Tensor]] = {"new": [], "old": [], "before": []}
    skip = generator.recipe.block_frames
    for plan in evaluation_plans(scenes, members, SEED, BLOCKS):
        tape = roll_out(generator, [plan], Consistency())
        videos = decode_tape(generator, tape)
        rows["new"].append(alignment(videos, tape.scenes, SWITCH + skip, 1))
        rows["old"].append(alignment(videos, tape.scenes, SWITCH + skip, 0))
        before = VideoBatch(videos.frames[:, :SWITCH], videos.fps, tuple(w[:1] for w in videos.windows))
        rows["before"].append(alignment(before, tape.scenes, 0, 0))
    return {name: torch.stack(row) for name, row in rows.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=24, help="pairs of captions")
    parser.add_argument("--members", type=int, default=8, help="noises per scene")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    scenes = ShapesSwitches(SWITCH, limit=options.scenes).scenes()
    print(f"{len(scenes)} scenes × {options.members} noises, {BLOCKS * 3} frames, switch at frame {SWITCH}")
    print("TA before the switch, after it under the new and the old prompt; new − old; new − old against NoRecache")
    default, without = type(ShapesGenerator().recache), None
    for recache in RECACHES:
        ta = turned(packaged_generator(recache=recache), scenes, options.members)
        turn = ta["new"] - ta["old"]
        without = turn if without is None else without
        name = type(recache).__name__ + (" (default)" if type(recache) is default else "")
        columns = "  ".join(f"{ta[row].mean():.3f}" for row in ("before", "new", "old"))
        print(f"{name:<26}  {columns}  {interval(turn)}  {interval(turn - without)}", flush=True)


def interval(values: Tensor) -> str:
    """The mean over scenes and noises and its 95 % interval, clustered by scene."""
    mean, low, high = clustered_bootstrap(values)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
