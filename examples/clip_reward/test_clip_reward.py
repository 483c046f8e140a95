"""The reward keeps the framework's promises and is the cosine that it says."""

from pathlib import Path

import pytest
import torch
from clip_reward import PromptMatch, contrast
from tiny_clip import save

from framework.conformance import check_reward
from framework.types import VideoBatch, Window
from rewards.function import WindowFunction

FRAMES = torch.randint(0, 256, (3, 6, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
VIDEOS = VideoBatch(FRAMES, 8.0, ((Window(0, 3, "a dog"), Window(3, 6, "the sea")),) + ((Window(0, 6, "a cat"),),) * 2)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> PromptMatch:
    folder: Path = tmp_path_factory.mktemp("clip")
    save(str(folder))
    return PromptMatch(str(folder))


def test_it_keeps_the_promises_of_a_reward(reward: PromptMatch):
    check_reward(reward, VIDEOS)


def test_a_clip_is_judged_by_the_prompts_of_its_windows(reward: PromptMatch):
    one = reward.score(VideoBatch(FRAMES[:1, :3], 8.0, ((Window(0, 3, "a dog"),),))).values["match"]
    two = reward.score(VideoBatch(FRAMES[:1, 3:], 8.0, ((Window(0, 3, "the sea"),),))).values["match"]
    torch.testing.assert_close(reward.score(VIDEOS).values["match"][:1], (one + two) / 2)


def test_the_function_is_a_reward_with_a_line_of_configuration():
    check_reward(WindowFunction(contrast, ["contrast"]), VIDEOS)
