"""The embedded world is what its captions say, and its captions are split once and for all."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.data.shapes import (
    BACKGROUND,
    CAPTIONS,
    PALETTE,
    RADIUS,
    SIZE,
    VOCABULARY,
    Caption,
    ClipFactors,
    PreferenceWorld,
    blur,
    coverage,
    parse_caption,
    render_clips,
    split_captions,
    wrap,
)
from tests.support import close, holds, over, refuted

CENTRES = st.tuples(st.floats(-40, 40), st.floats(-40, 40))
CHOSEN = st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**20)


# shapes on the torus


def check_equal_area(cover: Callable[[Tensor], Tensor], centre: tuple[float, float]) -> None:
    """Every shape covers π r² pixels wherever it is, to the error of anti-aliasing."""
    areas = cover(torch.tensor(centre)).sum((-1, -2))
    close(areas, torch.full((3,), math.pi * RADIUS**2), atol=1.5)


def one_radius_for_all(centre: Tensor) -> Tensor:
    """A planted error: circle, square and triangle of one in-radius."""
    cover = coverage(centre)
    pixels = torch.arange(SIZE, dtype=centre.dtype)
    x, y = wrap(pixels - centre[0])[None, :], wrap(pixels - centre[1])[:, None]
    square = (0.5 - (torch.maximum(x.abs(), y.abs()) - RADIUS)).clamp(0, 1)
    return torch.stack([cover[0], square, cover[2]])


def cut_at_the_border(centre: Tensor) -> Tensor:
    """A planted error: no wrap-around."""
    cover = coverage(centre)
    pixels = torch.arange(SIZE)
    return cover * ((pixels - centre[0]).abs() < SIZE / 2) * ((pixels - centre[1]).abs() < SIZE / 2)[:, None]


def test_all_shapes_have_one_area_everywhere():
    holds(partial(check_equal_area, coverage), CENTRES)


@pytest.mark.parametrize("mutant", [one_radius_for_all, cut_at_the_border])
def test_the_area_check_sees_other_sizes_and_a_border(mutant: Callable[[Tensor], Tensor]):
    refuted(partial(check_equal_area, mutant), CENTRES)


def check_wraps(cover: Callable[[Tensor], Tensor], centre: tuple[float, float], shift: tuple[int, int]) -> None:
    """A step of the centre by whole pixels rolls the picture; a whole turn changes nothing."""
    place = torch.tensor(centre, dtype=torch.float64)
    x, y = shift
    close(cover(place + torch.tensor(shift)), cover(place).roll((y, x), dims=(-2, -1)), atol=1e-9)
    close(cover(place + SIZE * torch.tensor(shift)), cover(place), atol=1e-9)


WHOLE = st.tuples(st.integers(-20, 20), st.integers(-20, 20))


def test_pictures_wrap_around():
    holds(partial(check_wraps, coverage), CENTRES, WHOLE)


def test_the_wrap_check_sees_a_border():
    refuted(partial(check_wraps, cut_at_the_border), CENTRES, WHOLE)


@over(st.floats(-200, 200))
def test_the_signed_distance_is_the_shortest_way_round(offset: float):
    folded = float(wrap(torch.tensor(offset, dtype=torch.float64)))
    shortest = min((offset + SIZE * k for k in range(-20, 21)), key=abs)
    assert -SIZE / 2 <= folded < SIZE / 2 and abs(abs(folded) - abs(shortest)) < 1e-9


@over(CENTRES, st.floats(0.4, 1.5))
def test_blur_keeps_the_light_and_spreads_it(centre: tuple[float, float], sigma: float):
    image = coverage(torch.tensor(centre, dtype=torch.float64))
    blurred = blur(image, sigma)
    close(blurred.sum((-1, -2)), image.sum((-1, -2)), atol=1e-4)
    assert bool((blurred.square().sum((-1, -2)) < image.square().sum((-1, -2))).all())
    close(blur(image.roll(5, dims=-1), sigma), blurred.roll(5, dims=-1), atol=1e-9)


# captions


def test_all_captions_differ_and_survive_a_round_trip():
    assert len({str(caption) for caption in CAPTIONS}) == len(CAPTIONS) == 6 * 3 * 4 * 2
    for caption in CAPTIONS:
        assert parse_caption(str(caption)) == caption
        assert parse_caption(f"  {str(caption).upper()}. ") == caption
        assert all(word in VOCABULARY for word in str(caption).split())


@pytest.mark.parametrize(
    "text",
    ["", "a red circle", "a red circle moves left", "a pink circle moves left slowly", "a left circle moves red slowly",
     "the red circle moves left slowly", "a red circle runs left slowly", "a red circle moves left slowly now"],
)  # fmt: skip
def test_what_the_world_cannot_show_is_refused_with_its_grammar(text: str):
    with pytest.raises(ValueError, match=r"cannot read the caption .*a COLOUR SHAPE moves DIRECTION SPEED.*red/green"):
        parse_caption(text)


Split = Callable[[int], tuple[tuple[Caption, ...], tuple[Caption, ...]]]


def check_split(split: Split, held_out: int) -> None:
    """Disjoint, complete, of the asked size, the same every time, and a smaller one inside a larger one."""
    torch.manual_seed(held_out)  # the global stream has no say
    trained, judged = split(held_out)
    assert len(judged) == held_out and Counter(trained + judged) == Counter(CAPTIONS)
    assert split(held_out) == (trained, judged)
    if held_out > 1:
        assert split(held_out - 1)[1] == judged[:-1]


def drawn_anew(held_out: int) -> tuple[tuple[Caption, ...], tuple[Caption, ...]]:
    order = torch.randperm(len(CAPTIONS)).tolist()
    return tuple(CAPTIONS[i] for i in order[held_out:]), tuple(CAPTIONS[i] for i in order[:held_out])


def overlapping(held_out: int) -> tuple[tuple[Caption, ...], tuple[Caption, ...]]:
    return CAPTIONS, CAPTIONS[:held_out]


COUNTS = st.integers(1, len(CAPTIONS) - 1)


def test_the_split_is_disjoint_and_fixed():
    holds(partial(check_split, split_captions), COUNTS)


@pytest.mark.parametrize("mutant", [drawn_anew, overlapping])
def test_the_split_check_sees_a_new_draw_and_an_overlap(mutant: Split):
    refuted(partial(check_split, mutant), COUNTS)


def test_the_published_split_never_changes():
    judged = split_captions()[1]
    assert [str(caption) for caption in judged[:3]] == [
        "a green triangle moves up slowly",
        "a magenta square moves right quickly",
        "a green triangle moves up quickly",
    ]


@pytest.mark.parametrize("held_out", [0, 144, -3])
def test_a_split_without_two_sides_is_refused(held_out: int):
    with pytest.raises(ValueError, match=r"held_out_count=.* must lie in 1 … 143"):
        split_captions(held_out)


# clips


def centroid(picture: Tensor) -> Tensor:
    """Place (x, y) of the light [SIZE, SIZE] on the torus, by its first Fourier mode."""
    angle = torch.arange(SIZE) * (2 * math.pi / SIZE)
    ways = [(picture.sum(axis) * torch.exp(1j * angle)).sum().angle() for axis in (0, 1)]
    return torch.stack(ways) * SIZE / (2 * math.pi)


def check_motion(render: Callable[..., Tensor], captions: list[Caption], seed: int, pace: float) -> None:
    """The object moves by the caption's velocity times the pace, frame by frame."""
    factors = replace(ClipFactors.clean(len(captions)), pace=torch.full((len(captions),), pace))
    clips = render(captions, 5, factors, torch.Generator().manual_seed(seed))
    for clip, caption in zip(clips, captions, strict=True):
        light = (clip + 1) / 2 - BACKGROUND
        places = torch.stack([centroid(light[:, t].norm(dim=0)) for t in range(5)])
        steps = wrap(places[1:] - places[:-1])
        close(steps, pace * torch.tensor(caption.velocity).expand(4, 2), atol=0.1)


def upside_down(captions, frames, factors, generator) -> Tensor:
    return render_clips(captions, frames, factors, generator).flip(-2)


def test_objects_move_as_their_captions_say():
    holds(partial(check_motion, render_clips), CHOSEN, SEEDS, st.floats(0.5, 1.5))


def test_the_motion_check_sees_a_world_upside_down():
    refuted(partial(check_motion, upside_down), CHOSEN, SEEDS, st.floats(0.5, 1.5))


@over(CHOSEN, SEEDS, st.floats(0.4, 1.0))
def test_clips_show_the_colour_and_the_shape_of_their_caption(captions: list[Caption], seed: int, exposure: float):
    dimmed = replace(ClipFactors.clean(len(captions)), exposure=torch.full((len(captions),), exposure))
    clips = render_clips(captions, 3, dimmed, torch.Generator().manual_seed(seed))
    assert clips.shape == (len(captions), 3, 3, SIZE, SIZE) and bool(((clips >= -1) & (clips <= 1)).all())
    for clip, caption in zip(clips, captions, strict=True):
        light = (clip[:, 0] + 1) / 2 / exposure - BACKGROUND
        colour = torch.tensor(PALETTE[caption.colour]) - BACKGROUND
        close(light.flatten(1)[:, light.square().sum(0).argmax()], colour, atol=1e-5)
        assert abs(light.sum() / colour.sum() - math.pi * RADIUS**2) < 1.5


def test_a_world_is_drawn_from_its_generator_alone():
    world = PreferenceWorld()
    draws = []
    for noise in range(3):
        torch.manual_seed(noise)
        draws.append(world.sample(6, 4, torch.Generator().manual_seed(min(noise, 1))))
    (a, words_a), (b, words_b), (c, words_c) = draws
    assert not torch.equal(a, b) and torch.equal(b, c) and words_b == words_c and words_a != words_b


def test_the_world_is_flawed_on_purpose_and_its_words_are_true():
    clips, captions = PreferenceWorld().sample(400, 6, torch.Generator().manual_seed(0))
    assert all(caption in set(CAPTIONS) for caption in captions)
    brightest = ((clips + 1) / 2).amax((1, 2, 3, 4))
    full = torch.tensor([max(PALETTE[caption.colour]) for caption in captions])
    exposure = brightest / full  # a blurred peak is a little lower still
    assert 0.3 < float(exposure.min()) < 0.5 and float(exposure.max()) == pytest.approx(1.0, abs=0.02)
    assert 0.6 < float(exposure.mean()) < 0.78
    clean, _ = PreferenceWorld(1.0, 0.0, (1.0, 1.0), 0.0).sample(400, 6, torch.Generator().manual_seed(0))
    close(((clean + 1) / 2).amax((1, 2, 3, 4)), full, atol=1e-4)
    assert bool((clips[:, :, 0] != clean[:, :, 0]).flatten(1).any(1).all())


def test_the_words_of_the_vocabulary_are_the_worlds():
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 2 + 6 + 3 + 4 + 2
    assert {word for caption in CAPTIONS for word in str(caption).split()} == set(VOCABULARY)
