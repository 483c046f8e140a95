"""A stream that is watched: the clip of a rollout, told in blocks, whose prompts change, whose past can be cut off."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator
from backbones.history import FullHistory, SinkWindow
from benchmarks.measure import LiveBytes
from framework.data.script import Cue, Script
from framework.film import Direction, Take, film, scripted
from framework.kernels import Consistency
from framework.records import Endpoints
from framework.reporting.reel import Reel
from framework.rng import derive_seed, draw_noise
from framework.rollout import noise_shape, roll_out
from framework.schedules import FewStepSchedule
from framework.types import BranchPlan, GroupPlan, VideoBatch
from tests.support import PROMPTS, holds, refuted, tiny_generator

A, B, C = PROMPTS[:3]
KERNEL = Consistency()
GIVEN = torch.zeros(1, 3, 3, 16, 16)


def noise_of(generator: ShapesGenerator, seeds: Sequence[int]) -> Callable[[int], Tensor]:
    """The noise that `generate_prefix` gives block by block."""
    return lambda block: draw_noise([derive_seed(s, "block", block) for s in seeds], noise_shape(generator, KERNEL, 1))


def shown(takes: Iterator[Take]) -> Tensor:
    return torch.cat([take.frames for take in takes], dim=1)


def watched(
    generator: ShapesGenerator, scripts: Sequence[Script], blocks: int, seeds: Sequence[int], **options
) -> Tensor:
    directions = scripted([s.on_blocks(generator.recipe.block_frames) for s in scripts], 3, blocks)
    return shown(film(generator, directions, noise_of(generator, seeds), KERNEL, **options))


def prefix_of(generator: ShapesGenerator, script: Script, blocks: int, seed: int) -> Tensor:
    """The same frames by another way: the shared prefix of a rollout."""
    plan = GroupPlan(0, script.scene(), blocks, 1, seed, (BranchPlan(0),))
    prefix = roll_out(generator, [plan], KERNEL)[Endpoints].prefix
    assert prefix is not None
    return VideoBatch.from_signed(generator.decode(prefix), 8.0, ["x"]).frames


def script(*cues: Cue) -> Script:
    return Script("s", cues)


def check_film(seed: int, switch: int, make: Callable[..., Tensor] = watched) -> None:
    generator = tiny_generator()
    told = script(Cue(A), Cue(B, switch))
    assert torch.equal(make(generator, [told], 5, [seed]), prefix_of(generator, told, 5, seed))


def test_what_is_watched_is_what_a_rollout_makes_prompt_switches_included():
    holds(check_film, st.integers(0, 99), st.integers(1, 14), examples=5)


def test_the_film_check_sees_a_switch_without_recache():
    def no_switch(generator: ShapesGenerator, scripts: Sequence[Script], blocks: int, seeds: Sequence[int]) -> Tensor:
        return watched(generator, [replace(s, cues=s.cues[:1]) for s in scripts], blocks, seeds)

    refuted(functools.partial(check_film, make=no_switch), st.integers(0, 99), st.integers(1, 12), examples=3)


def test_clips_side_by_side_are_the_clips_alone():
    generator = tiny_generator()
    scripts = [script(Cue(A), Cue(B, 6)), script(Cue(C))]
    both = watched(generator, scripts, 4, [1, 2])
    for row, seed in enumerate((1, 2)):
        alone = watched(generator, scripts[row : row + 1], 4, [seed])
        assert (both[row].int() - alone[0].int()).abs().max() <= 1  # batched products round otherwise


# Cuts


def check_cut(seed: int, cut: bool = True) -> None:
    """Behind a cut stands what a stream of its own begins with, given the same noise."""
    generator = tiny_generator()
    told = script(Cue(A), Cue(B, 6, cut=cut))
    after = watched(generator, [told], 4, [seed])[:, 6:]
    noise = noise_of(generator, [seed])
    alone = shown(film(generator, scripted([script(Cue(B))], 3, 2), lambda block: noise(block + 2), KERNEL))
    assert torch.equal(after, alone)


def test_a_shot_behind_a_cut_remembers_nothing():
    holds(check_cut, st.integers(0, 99), examples=3)
    with pytest.raises(AssertionError):
        check_cut(0, cut=False)


def test_a_shot_without_a_new_prompt_keeps_the_one_in_force():
    generator = tiny_generator()
    directions = [Direction((A,)), Direction((None,), cut=True)]
    takes = list(film(generator, directions, noise_of(generator, [0]), KERNEL))
    assert [take.prompts for take in takes] == [(A,), (A,)] and takes[1].cut and not takes[1].changed


def test_a_decoder_is_called_block_after_block_and_a_new_one_starts_with_every_shot():
    generator, calls = tiny_generator(), []

    class Watching(ShapesGenerator):
        def decoder(self) -> Callable[[Tensor], Tensor]:
            number = len(calls)
            calls.append([])

            def decode(latents: Tensor) -> Tensor:
                calls[number].append(latents.shape[2])
                return self.decode(latents)

            return decode

    watching = Watching(generator.network)
    watched(watching, [script(Cue(A), Cue(B, 6, cut=True), Cue(C, 9))], 4, [0])
    assert calls == [[3, 3], [3, 3]]


# Given frames


def test_a_stream_goes_on_from_given_latents_as_from_its_own():
    generator = tiny_generator()
    told = script(Cue(A), Cue(B, 6))
    latents = roll_out(
        generator, [GroupPlan(0, told.scene(), 2, 1, 3, (BranchPlan(0),))], KERNEL
    )[Endpoints].prefix  # fmt: skip
    assert latents is not None and latents.shape[2] == 6
    whole = watched(generator, [told], 5, [3])
    assert torch.equal(watched(generator, [told], 5, [3], given=latents), whole)
    other = watched(generator, [told], 5, [3], given=-latents)
    assert not torch.equal(other[:, 6:], whole[:, 6:])


def test_given_blocks_are_shown_but_not_timed_as_generated(tmp_path: Path):
    generator, reel = tiny_generator(), Reel(8.0)
    takes = list(film(generator, scripted([script(Cue(A))], 3, 3), noise_of(generator, [0]), KERNEL, given=GIVEN))
    assert [take.given for take in takes] == [True, False, False]
    watched_frames: list[int] = []
    reel.write(takes, [tmp_path / "a.mp4"], lambda take: watched_frames.append(take.first_frame))
    assert reel.latencies == [take.seconds for take in takes[1:]] and watched_frames == [0, 3, 6]
    assert reel.first == takes[0].seconds + takes[1].seconds and reel.frames == 9
    assert Reel(8.0).report() == ["nothing was generated"]


# What a person types


def test_a_prompt_that_is_refused_changes_nothing_and_is_told():
    generator, told = tiny_generator(), []
    noise = noise_of(generator, [0])
    for wrong in (Direction(("nonsense",)), Direction(("nonsense",), cut=True)):
        directions = [Direction((A,)), Direction((None,)), wrong, Direction((None,))]
        takes = list(film(generator, directions, noise, KERNEL, refused=told.append))
        plain = watched(generator, [script(Cue(A))], 4, [0])
        assert torch.equal(shown(iter(takes)), plain)
        assert [take.changed for take in takes] == [True, False, False, False]
        assert not any(take.cut for take in takes[1:]) and takes[2].prompts == (A,)
    assert len(told) == 2 and all("nonsense" in str(error) for error in told)
    with pytest.raises(ValueError, match="nonsense"):
        list(film(generator, [Direction((A,)), Direction(("nonsense",))], noise, KERNEL))
    with pytest.raises(ValueError, match="nonsense"):
        list(film(generator, [Direction(("nonsense",))], noise, KERNEL, refused=told.append))


@pytest.mark.parametrize("directions", [[Direction((None,))], [Direction((A,)), Direction((A, B))]])
def test_a_direction_that_leaves_a_clip_without_a_prompt_is_refused(directions: list[Direction]):
    with pytest.raises((ValueError, AssertionError)):
        list(film(tiny_generator(), directions, noise_of(tiny_generator(), [0]), KERNEL))


def test_a_direction_is_asked_for_when_the_block_before_it_has_been_watched():
    generator, events = tiny_generator(), []

    def directions() -> Iterator[Direction]:
        for block in range(3):
            events.append(f"ask {block}")
            yield Direction((A if block == 0 else None,))

    for take in film(generator, directions(), noise_of(generator, [0]), KERNEL):
        events.append(f"watch {take.first_frame // 3}")
    assert events == ["ask 0", "watch 0", "ask 1", "watch 1", "ask 2", "watch 2"]


def test_takes_count_frames_from_the_start_of_the_video_cuts_or_not():
    generator = tiny_generator()
    takes = list(
        film(generator, scripted([script(Cue(A), Cue(B, 3, cut=True))], 3, 3), noise_of(generator, [0]), KERNEL)
    )
    assert [take.first_frame for take in takes] == [0, 3, 6]
    assert all(take.seconds > 0 and take.frames.device.type == "cpu" for take in takes)


# Memory


def peak(blocks: int, full: bool = False, hoard: bool = False) -> int:
    generator = tiny_generator(policy=FullHistory() if full else SinkWindow(sink=3, window=9))
    generator.recipe = replace(generator.recipe, schedule=FewStepSchedule((1000, 500)))
    told = script(Cue(A), Cue(B, 6), Cue(C, 12))
    kept = []
    with LiveBytes() as counter:
        directions = scripted([told], 3, blocks)
        for take in film(generator, directions, noise_of(generator, [0]), KERNEL):
            if hoard:
                kept.append(take.frames)
    return counter.peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length():
    """Ten times the length, switches included, takes at most 1.02 times the bytes; a leak takes more."""
    short = peak(6)
    assert peak(60) <= 1.02 * short
    assert peak(12, full=True) > 1.02 * peak(6, full=True)
    assert peak(12, hoard=True) > 1.02 * short
