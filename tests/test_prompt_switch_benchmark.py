"""The prompt-switch measurement can tell a clip that turns from one that does not, and prints a row per recache."""

import re

import pytest
import torch
from torch import Tensor

from benchmarks import prompt_switch
from benchmarks.prompt_switch import RECACHES, SWITCH, alignment
from framework.data.scenes import ShapesSwitches
from framework.data.shapes import ClipFactors, parse_caption, render_clips
from framework.types import Scene, VideoBatch

SCENES = ShapesSwitches(SWITCH, limit=6).scenes()


def rendered(scenes: tuple[Scene, ...], *, turning: bool) -> VideoBatch:
    """Perfect clips that follow their second caption after the switch, or keep to their first."""
    parts: list[Tensor] = []
    for segment in (0, 1 if turning else 0):
        captions = [parse_caption(scene.segments[segment].prompt) for scene in scenes]
        clean = ClipFactors.clean(len(captions))
        parts.append(render_clips(captions, SWITCH, clean, torch.Generator().manual_seed(segment)))
    prompts = [scene.prompt for scene in scenes]
    return VideoBatch.from_signed(torch.cat(parts, 2).transpose(1, 2), 8.0, prompts)


def difference(videos: VideoBatch) -> Tensor:
    return alignment(videos, SCENES, SWITCH + 3, 1) - alignment(videos, SCENES, SWITCH + 3, 0)


def test_a_perfect_turn_is_measured_as_one_and_a_clip_that_goes_on_as_the_opposite():
    assert bool((difference(rendered(SCENES, turning=True)) > 0.2).all())
    assert bool((difference(rendered(SCENES, turning=False)) < -0.2).all())


def test_the_command_prints_a_row_with_an_interval_for_every_recache(capsys: pytest.CaptureFixture[str]):
    prompt_switch.main(["--scenes", "2", "--members", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 scenes × 1 noises")
    rows = [line for line in lines if re.search(r"[+-]\d\.\d{3} \[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]", line)]
    assert [row.split()[0] for row in rows] == [type(recache).__name__ for recache in RECACHES]
    assert sum("(default)" in row for row in rows) == 1
