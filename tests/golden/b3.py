"""Kind b3: a LongLive rollout whose prompt switches, with the past encoded again under the new one."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from backbones.recache import CleanPass, JointRecache, MovedSinkRecache, Recache
from backbones.streaming import WanStream
from backbones.visible import LayerKV
from framework.types import Scene, Segment, Visible
from tests.golden.backbone import (
    ROLLOUT_INPUTS,
    TOLERANCE,
    GoldenGenerator,
    Spans,
    as_tabulated,
    block_spans,
    build_generator,
    check_schedule,
    few_step_schedule,
    frame_policy,
    precision,
    roll_out,
)
from tests.golden.case import Case, Row, compare

INPUTS: tuple[str, ...] = ROLLOUT_INPUTS
NOT_TAKEN_UP: tuple[str, ...] = ()
VARIANTS: dict[str, Recache] = {"keep_sink": JointRecache(), "recache_sink": MovedSinkRecache()}
RECACHED = "min(window, frames generated so far)"


class SwitchingGenerator(GoldenGenerator):
    """A generator whose clips follow scenes; prompts are rows of the flattened ``prompt_embeds``."""

    scenes: tuple[Scene, ...]
    recached: list[Tensor]
    """The network's output in every recache pass so far."""

    def start(self, batch: int) -> WanStream:
        stream = self.open([scene.prompt for scene in self.scenes], switches=True)
        return self.fork(stream, batch // len(self.scenes))

    def commit(self, x0: Tensor, stream: WanStream, visible: Visible | None = None) -> WanStream:
        return self.follow(super().commit(x0, stream, visible), self.scenes)

    def _reencode(self, part: CleanPass, *behind) -> tuple[Tensor, Sequence[LayerKV]]:
        output, kv = super()._reencode(part, *behind)
        self.recached.append(output)
        return output, kv


def scenes_of(case: Case, spans: Spans) -> tuple[Scene, ...]:
    """One scene per row of the prompts [prompts, rows, L, D]; a switch takes effect with the first block after it."""
    count, rows = case["prompt_embeds"].shape[:2]
    frames = case.hparam("switch_frames")
    if len(frames) != count - 1:
        raise ValueError(f"{case.name}: {count} prompts need {count - 1} switch_frames, got {frames}")
    stop = spans[-1][1]
    blocks = [0] + [next((first for first, _ in spans if first >= frame), stop) for frame in frames]
    starts = {first: prompt for prompt, first in enumerate(blocks) if first < stop}
    return tuple(
        Scene(str(row), tuple(Segment(str(prompt * rows + row), first) for first, prompt in sorted(starts.items())))
        for row in range(rows)
    )


def switching_generator(case: Case, recache: Recache, dtype: torch.dtype) -> SwitchingGenerator:
    """The case's network behind its policy and a recache."""
    policy = frame_policy(case.hparam("sink_frames"), case.hparam("window_frames_including_current_block"))
    spans = block_spans(case, case["noise"].shape[2])
    flat = replace(case, tensors={**case.tensors, "prompt_embeds": case["prompt_embeds"].flatten(0, 1)})
    plain = build_generator(flat, policy, spans, as_tabulated(case, few_step_schedule(case)), dtype)
    generator = SwitchingGenerator(plain.network, plain.recipe, policy, plain.prompt_embeds, spans)
    generator.recache, generator.scenes, generator.recached = recache, scenes_of(case, spans), []
    return generator


def check(case: Case) -> list[Row]:
    """Every tensor of every variant: latents, velocities, and the outputs of the recache passes."""
    if case.hparams.get("recache_frames", RECACHED) != RECACHED:
        raise ValueError(f"{case.name}: recache_frames={case.hparams['recache_frames']!r} is not {RECACHED!r}")
    rows = check_schedule(case, few_step_schedule(case))
    names = re.compile(rf"(latents|velocity|x0|clean_velocity|recache_velocity)\.({'|'.join(VARIANTS)})(?:\.(\d+))?")
    asked = [match for match in map(names.fullmatch, case.tensors) if match]
    for variant, recache in VARIANTS.items():
        wanted = [match for match in asked if match[2] == variant]
        for dtype, tolerance in TOLERANCE.items() if wanted else ():
            generator = switching_generator(case, recache, dtype)
            rollout = roll_out(case, generator, dtype)
            for match in wanted:
                numbered = match[3] is not None
                found = generator.recached[int(match[3])] if numbered else getattr(rollout, match[1])
                rows.append(compare(case, match[0], found, tolerance, precision(dtype)))
    return rows
