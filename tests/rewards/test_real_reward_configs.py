"""The gin files of the real rewards are read with the papers' recipes, and hold the papers' estimators."""

from typing import Any

import pytest

from framework.config.load import Configuration, load_config, packaged_folder
from framework.pooling import MeanFrames, TailAware, TopFrames
from rewards.composite import CompositeReward
from rewards.frame_sampling import AllFrames, StratifiedFrames
from rewards.hpsv3 import HPSv3
from rewards.videoalign import VideoAlign
from tests.rewards.scorers import hps, video_align

FILES = ("videoalign", "hpsv3", "astrolabe", "kvpo")
RECIPE = (
    "GENERATOR = @embedded.packaged_generator()", "JUDGE = %REWARD", "SCENES = @scenes.ShapesCaptions()",
    "HELD_OUT = @held_out/scenes.ShapesCaptions()", "held_out/scenes.ShapesCaptions.held_out = True",
)  # fmt: skip
ASKED = {
    "videoalign": ("videoalign.released.checkpoint = 'a'", "videoalign.released.template = 'b'"),
    "hpsv3": ("hpsv3.released.checkpoint = 'c'",),
}


def loaded(file: str, recipe: str = "papers/astrolabe.gin", asked: tuple[str, ...] | None = None) -> Configuration:
    if asked is None:
        asked = ASKED[file] if file in ASKED else ASKED["videoalign"] + ASKED["hpsv3"]
    files = [recipe, f"rewards/{file}.gin"]
    return load_config("train", gin_files=files, gin_params=[*RECIPE, *asked], flags={"output_dir": "nowhere"})


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Checkpoints are not loaded; what they were asked for with is kept."""
    asked: dict[str, dict[str, Any]] = {}

    def video(**given) -> VideoAlign:
        asked["videoalign"] = given
        return video_align()

    def frame(**given) -> HPSv3:
        asked["hpsv3"] = given
        return hps(frames=given["frames"], pooling=given["pooling"])

    monkeypatch.setattr("framework.config.registry.Registry._part", staged(video, frame))
    return asked


def staged(video, frame):
    from framework.config.registry import Part, Registry

    real = Registry._part

    def part(name: str, target: Any) -> Part:
        found = real(name, target)
        stand_in = {"videoalign.released": video, "hpsv3.released": frame}.get(name)
        return found if stand_in is None else Part(name, stand_in, found.parameters)

    return staticmethod(part)


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_short_and_says_what_it_is(file: str):
    lines = (packaged_folder() / f"rewards/{file}.gin").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 20 and lines[0].startswith("# ") and max(map(len, lines)) <= 120


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("recipe", ["papers/astrolabe.gin", "papers/kvpo.gin"])
def test_a_file_completes_a_papers_recipe(file: str, recipe: str):
    loaded(file, recipe)


@pytest.mark.parametrize("file", FILES)
def test_what_is_not_said_is_asked_for(file: str):
    with pytest.raises(ValueError, match=r"released\.(checkpoint|template)|released.*checkpoint"):
        loaded(file, asked=())


def test_videoalign_gives_its_three_signals_with_motion_in_gray(built):
    reward = loaded("videoalign").build()["reward"]
    assert isinstance(reward, VideoAlign) and reward.signals == ("VQ", "MQ", "TA") and reward.gray_motion
    assert built["videoalign"]["checkpoint"] == "a" and built["videoalign"].get("gray_motion", True)


def test_hpsv3_looks_at_eight_frames_and_at_the_worst_of_them(built):
    reward = loaded("hpsv3").build()["reward"]
    assert isinstance(reward, HPSv3)
    assert (reward.frames, reward.pooling) == (StratifiedFrames(8), TailAware())


def test_astrolabes_file_pools_the_best_third_of_all_frames_beside_videoalign(built):
    reward = loaded("astrolabe").build()["reward"]
    assert isinstance(reward, CompositeReward) and reward.signals == ("VQ", "MQ", "TA", "HPSv3")
    assert built["hpsv3"]["frames"] == AllFrames() and built["hpsv3"]["pooling"] == TopFrames(0.3)


def test_kvpos_file_averages_all_frames_beside_videoalign(built):
    reward = loaded("kvpo", "papers/kvpo.gin").build()["reward"]
    assert isinstance(reward, CompositeReward) and reward.signals == ("HPSv3", "VQ", "MQ", "TA")
    assert built["hpsv3"]["frames"] == AllFrames() and built["hpsv3"]["pooling"] == MeanFrames()
