"""The spread of a group is taken apart into what was put in: place, trajectory, brightness, and the rest."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import group_spread
from benchmarks.group_spread import FEATURES, Clips, circular_mean, deviations, moved, taken_apart
from framework.data.shapes import BACKGROUND, CAPTIONS, ClipFactors, coverage, render_clips
from framework.kernels import Consistency
from framework.rollout import roll_out
from tests.support import close, normal, tiny_generator

FRAMES = 6


def drawn(centre: Tensor, light: Tensor) -> Clips:
    """Clips of one grey disc with centres [G, T, 2] and brightness [G]."""
    cover = coverage(centre)[..., 0, :, :].unsqueeze(2).expand(-1, -1, 3, -1, -1)
    pixels = BACKGROUND + 0.5 * cover * light[:, None, None, None, None]
    return Clips.of((255 * pixels).round().clamp(0, 255).to(torch.uint8))


def path(start: float, speed: float) -> Tensor:
    """Centres [T, 2] of a straight line."""
    time = torch.arange(FRAMES) * speed
    return torch.stack([start + time, torch.full_like(time, 8.0)], -1)


SAME = torch.stack([path(4.0, 1.0)] * 2)
PLACED = torch.stack([path(4.0, 1.0), path(6.0, 1.0)])
DRIVEN = torch.stack([path(4.0, 1.0), path(4.0, 0.0)])
ONES = torch.ones(2)
CASES = {
    "place": (PLACED, ONES),
    "trajectory": (DRIVEN, ONES),
    "brightness": (SAME, torch.tensor([1.0, 0.7])),
}


def shares(clips: Clips) -> dict[str, float]:
    total, *left = taken_apart(clips).tolist()
    parts = [a - b for a, b in zip([total, *left], [*left, 0.0], strict=True)]
    return dict(zip(("place", "trajectory", "brightness", "rest"), (part / total for part in parts), strict=True))


def check_share(split: Callable[[Clips], dict[str, float]], case: str) -> None:
    """What was put in is nearly all that comes out; a trajectory that diverges also has a mean offset."""
    found = split(drawn(*CASES[case]))
    assert found[case] > (0.3 if case == "trajectory" else 0.85)
    assert found["rest"] < 0.1


@pytest.mark.parametrize("case", CASES)
def test_a_difference_is_attributed_to_what_makes_it(case: str):
    check_share(shares, case)


@pytest.mark.parametrize("case", ["place", "trajectory"])
def test_the_attribution_check_sees_clips_that_are_moved_the_wrong_way(case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group_spread, "moved", lambda image, offset: moved(image, -offset))
    with pytest.raises(AssertionError):
        check_share(shares, case)


def test_moving_by_whole_pixels_is_a_roll_and_back_again_is_nothing():
    image = normal(0, 2, 3, 16, 16, dtype=torch.float32)
    offset = torch.tensor([[3.0, -2.0], [0.0, 5.0]])
    expected = torch.stack([image[0].roll((-2, 3), (-2, -1)), image[1].roll(5, -2)])
    close(moved(image, offset), expected, atol=1e-5)
    close(circular_mean(torch.tensor([[7.5, 0.0], [-7.5, 0.0]])).abs(), torch.tensor([8.0, 0.0]), atol=1e-4)


def test_deviations_are_measured_in_their_own_units():
    def found(centre: Tensor, light: Tensor) -> dict[str, float]:
        return dict(zip(FEATURES, deviations(drawn(centre, light)).tolist(), strict=True))

    assert found(SAME, ONES) == pytest.approx(dict.fromkeys(FEATURES, 0.0), abs=0.03)  # acos rounds near 1
    assert found(PLACED, ONES)["place, px"] == pytest.approx(1.0, abs=0.05)  # ±1 about their mean
    assert found(DRIVEN, ONES)["velocity, px/frame"] == pytest.approx(0.5, abs=0.05)
    assert found(SAME, torch.tensor([1.0, 0.5]))["brightness, relative"] == pytest.approx(1 / 3, abs=0.02)


def test_hue_is_an_angle_between_colours():
    red, also_red, blue = CAPTIONS[0], CAPTIONS[1], CAPTIONS[2 * 24]
    videos = render_clips([red, also_red, blue], FRAMES, ClipFactors.clean(3), torch.Generator().manual_seed(0))
    clips = Clips.of(((videos.transpose(1, 2) + 1) * 127.5).round().to(torch.uint8))
    hue = FEATURES.index("hue, °")
    assert deviations(Clips(clips.light[:2], clips.centre[:2]))[hue] < 2 < 20 < deviations(clips)[hue]


def test_arms_share_their_prefixes_and_noise_arms_have_no_route():
    recipe = tiny_generator().recipe
    arms = {name: group_spread.plans_of(arm, 2, 2, 0, recipe) for name, arm in group_spread.ARMS.items()}
    behind = [plans for name, plans in arms.items() if name != "noise, from the first frame"]
    assert len({(p[0].first_block, p[0].prefix_seed, p[1].prefix_seed) for p in behind}) == 1
    for name, plans in arms.items():
        routed = [branch.route is not None for branch in plans[0].branches]
        assert routed == [not name.startswith("noise")] * 2 + [False]
        assert len({branch.noise_seed for branch in plans[0].branches}) == (3 if name.startswith("noise") else 1)
    assert roll_out(tiny_generator(), arms["noise, from the first frame"], Consistency()).plans[0].first_block == 0


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the other tests keep theirs
    page = tmp_path / "spread.md"
    group_spread.main(["--captions", "2", "--pivots", "1", "--group", "2", "--output", str(page)])
    printed = capsys.readouterr().out.strip()
    assert page.read_text().strip().endswith(printed)
    assert "python -m benchmarks.group_spread --captions 2 --pivots 1 --group 2" in page.read_text()
    assert printed.count("| routing, first half |") == 3
