"""Groups are groups: every prompt of a step exactly G times, and a clip's noise its own in any company."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator, embedded_recipe
from framework.data.scenes import PromptFile, ShapesCaptions, draw_scenes, scene_indices
from framework.evaluation import evaluate_policy, evaluation_plans
from framework.kernels import Consistency
from framework.records import Endpoints
from framework.rng import Streams, derive_seed, draw_noise
from framework.rollout import roll_out
from framework.types import GroupPlan, Scene, Tape
from strategies.exploration.noise_endpoint import Anywhere, First, Last, NoiseEndpoint, OneOf, WindowLayout
from tests.support import PROMPTS, Brightness, close, group_plans, holds, over, refuted, tiny_generator

RECIPE = embedded_recipe()
SCENES = tuple(Scene.single(f"prompt {i}") for i in range(40))
Draw = Callable[[Sequence[Scene], int, int, int], tuple[list[Scene], list[int]]]


@st.composite
def runs(draw) -> tuple[int, int, int, int]:
    """(prompts in the file, prompts per step, group size, seed)."""
    total = draw(st.integers(1, 40))
    return total, draw(st.integers(1, total)), draw(st.integers(2, 5)), draw(st.integers(0, 2**31))


def check_groups(draw: Draw, run: tuple[int, int, int, int]) -> None:
    """Over two epochs: G clips of each prompt in a step, ids that never return, no repetition inside an epoch."""
    total, count, size, seed = run
    seen: list[int] = []
    epoch: list[str] = []
    for step in range(2 * (total // count)):
        scenes, ids = draw(SCENES[:total], step, count, seed)
        tape = Tape(NoiseEndpoint(size).plan(scenes, ids, RECIPE, Streams(seed).at("step", step)), {})
        assert Counter(scene.key for scene in tape.scenes) == {scene.key: size for scene in scenes}
        assert len(tape.scenes) == count * size
        assert all(int((tape.groups == group).sum()) == size for group in ids)
        of_group = [tape.scenes[i].key for i in range(len(tape.scenes)) if tape.groups[i] == ids[0]]
        assert len(set(of_group)) == 1
        seen += ids
        epoch = [scene.key for scene in scenes] if step % (total // count) == 0 else [*epoch, *(s.key for s in scenes)]
        assert len(set(epoch)) == len(epoch)
    assert len(set(seen)) == len(seen)


def seeded_per_epoch(scenes: Sequence[Scene], step: int, count: int, seed: int) -> tuple[list[Scene], list[int]]:
    """The sampler is seeded once per epoch: one batch is repeated all epoch."""
    return draw_scenes(scenes, step - step % (len(scenes) // count), count, seed)[0], draw_scenes(
        scenes, step, count, seed
    )[1]


def with_replacement(scenes: Sequence[Scene], step: int, count: int, seed: int) -> tuple[list[Scene], list[int]]:
    """Prompts drawn independently: two groups of a step can be one prompt."""
    random = torch.Generator().manual_seed(seed + step)
    picked = torch.randint(len(scenes), (count,), generator=random).tolist()
    return [scenes[i] for i in picked], draw_scenes(scenes, step, count, seed)[1]


def numbered_within_the_step(
    scenes: Sequence[Scene], step: int, count: int, seed: int
) -> tuple[list[Scene], list[int]]:
    return draw_scenes(scenes, step, count, seed)[0], list(range(count))


def test_every_prompt_of_a_step_is_there_exactly_group_size_times():
    holds(partial(check_groups, draw_scenes), runs())


@pytest.mark.parametrize("mutant", [seeded_per_epoch, with_replacement, numbered_within_the_step])
def test_the_group_check_sees_groups_that_are_not_groups(mutant: Draw):
    refuted(partial(check_groups, mutant), runs())


@over(runs(), st.lists(st.integers(0, 50), min_size=2, max_size=6))
def test_the_prompts_of_a_step_are_pure_arithmetic(run: tuple[int, int, int, int], steps: list[int]):
    total, count, _, seed = run
    forward = {step: scene_indices(total, step, count, seed) for step in steps}
    torch.manual_seed(len(steps))  # the global stream has no say
    assert {step: scene_indices(total, step, count, seed) for step in reversed(steps)} == forward


def test_epochs_are_shuffled_anew_and_by_the_seed():
    epochs = [tuple(i for step in range(8) for i in scene_indices(24, 8 * e + step, 3, 0)) for e in range(3)]
    assert len(set(epochs)) == 3 and all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert scene_indices(24, 0, 3, 0) != scene_indices(24, 0, 3, 1)


@pytest.mark.parametrize("count", [0, 41, -1])
def test_more_prompts_per_step_than_prompts_are_refused(count: int):
    with pytest.raises(ValueError, match=rf"prompts_per_step={count} must lie in 1 … 40"):
        scene_indices(40, 0, count, 0)


def test_a_group_of_one_is_refused_and_so_is_a_window_of_nothing():
    with pytest.raises(ValueError, match=r"NoiseEndpoint\.group_size=1.*at least 2"):
        NoiseEndpoint(1)
    for name in ("stream_blocks", "window_blocks"):
        with pytest.raises(ValueError, match=rf"NoiseEndpoint\.{name} must be at least 1"):
            NoiseEndpoint(**{name: 0})
    with pytest.raises(ValueError, match=r"window_blocks=8 does not fit into a stream of 7 blocks"):
        NoiseEndpoint(window_blocks=8).plan(SCENES[:1], [0], RECIPE, Streams(0))


LAYOUTS = (First(), Last(), Anywhere(), Anywhere(3), OneOf((0, 2, 5)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_a_window_fits_its_stream_and_starts_at_one_place_for_all_groups_of_a_step(layout: WindowLayout):
    exploration = NoiseEndpoint(2, stream_blocks=9, window_blocks=3, layout=layout)
    starts = set()
    for step in range(40):
        streams = Streams(1).at("step", step)
        plans = exploration.plan(SCENES[:4], [4 * step + i for i in range(4)], RECIPE, streams)
        (alone,) = exploration.plan(SCENES[3:4], [4 * step + 3], RECIPE, streams)
        assert plans[3] == alone and len({p.first_block for p in plans}) == 1 and alone.blocks == 3
        starts.add(alone.first_block)
    expected = {First(): {0}, Last(): {6}, Anywhere(): set(range(7)), Anywhere(3): {3, 4, 5, 6}}
    assert starts == expected.get(layout, {0, 2, 5})


def test_a_start_outside_the_stream_is_refused():
    for layout in (Anywhere(7), Anywhere(-1), OneOf((0, 7))):
        with pytest.raises(ValueError, match=rf"{type(layout).__name__}\..*0 … 6, the latest start that fits"):
            NoiseEndpoint(2, stream_blocks=9, window_blocks=3, layout=layout).plan(SCENES[:1], [0], RECIPE, Streams(0))
    with pytest.raises(ValueError, match=r"OneOf\.blocks"):
        OneOf(())


# where prompts come from


def test_trained_and_held_out_captions_are_disjoint_and_together_all():
    trained, held_out = ShapesCaptions().scenes(), ShapesCaptions(held_out=True).scenes()
    keys = [{scene.key for scene in scenes} for scenes in (trained, held_out)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 144 and len(held_out) == 24
    assert ShapesCaptions(held_out=True, limit=3).scenes() == held_out[:3]


def test_a_prompt_file_keeps_equal_prompts_apart_and_drops_blank_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat  \n\n  a dog\na cat\n", encoding="utf-8")
    scenes = PromptFile(str(file)).scenes()
    assert [scene.prompt for scene in scenes] == ["a cat", "a dog", "a cat"]
    assert len({scene.key for scene in scenes}) == 3


@pytest.mark.parametrize("text", ["", "\n \n\t\n"])
def test_a_prompt_file_without_prompts_is_refused(tmp_path, text: str):
    file = tmp_path / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"PromptFile\.path=.*the file is empty"):
        PromptFile(str(file)).scenes()
    with pytest.raises(ValueError, match="is not a file"):
        PromptFile(str(tmp_path / "nowhere.txt")).scenes()


# noise


Plan = Callable[[Sequence[Scene], Sequence[int], Streams], tuple[GroupPlan, ...]]


def real_plan(scenes: Sequence[Scene], groups: Sequence[int], streams: Streams) -> tuple[GroupPlan, ...]:
    return NoiseEndpoint(3, window_blocks=6, layout=Last()).plan(scenes, groups, RECIPE, streams)


def check_seeds_are_a_groups_own(plan: Plan, seed: int, order: list[int]) -> None:
    """Planned with others, in any order, or alone: the seeds of a group are the same, and nobody else's."""
    streams = Streams(seed).at("step", 4)
    together = plan([SCENES[i] for i in order], order, streams)
    for place, group in enumerate(order):
        (alone,) = plan([SCENES[group]], [group], streams)
        assert together[place] == alone
    seeds = [branch.noise_seed for p in together for branch in p.branches] + [p.prefix_seed for p in together]
    assert len(set(seeds)) == len(seeds)
    (later,) = plan([SCENES[order[0]]], [order[0]], Streams(seed).at("step", 5))
    assert later.branches != together[0].branches and later.prefix_seed != together[0].prefix_seed


def by_place_in_the_batch(scenes: Sequence[Scene], groups: Sequence[int], streams: Streams) -> tuple[GroupPlan, ...]:
    """Seeds that count the rows of this rank's batch."""
    planned = real_plan(scenes, range(len(groups)), streams)
    return tuple(GroupPlan(g, p.scene, p.first_block, p.blocks, p.prefix_seed, p.branches)
                 for g, p in zip(groups, planned, strict=True))  # fmt: skip


def without_the_step(scenes: Sequence[Scene], groups: Sequence[int], streams: Streams) -> tuple[GroupPlan, ...]:
    return real_plan(scenes, groups, Streams(streams.seed))


ORDERS = st.permutations(range(6)).flatmap(lambda order: st.integers(1, 6).map(lambda n: order[:n]))


def test_the_seeds_of_a_group_do_not_depend_on_its_company():
    holds(partial(check_seeds_are_a_groups_own, real_plan), st.integers(0, 2**31), ORDERS)


@pytest.mark.parametrize("mutant", [by_place_in_the_batch, without_the_step])
def test_the_seed_check_sees_seeds_by_place_and_a_repeated_step(mutant: Plan):
    refuted(partial(check_seeds_are_a_groups_own, mutant), st.integers(0, 2**31), ORDERS)


Noise = Callable[[Sequence[int], Sequence[int]], Tensor]


def one_stream_for_the_batch(seeds: Sequence[int], shape: Sequence[int], device: object = "cpu") -> Tensor:
    """A planted error: rows drawn one after the other from the first seed."""
    return torch.randn(len(seeds), *shape, generator=torch.Generator().manual_seed(seeds[0]))


def check_noise_is_a_seeds_own(draw: Noise, seeds: list[int]) -> None:
    noise = draw(seeds, (2, 3))
    assert noise.shape == (len(seeds), 2, 3) and noise.dtype == torch.float32
    for i, seed in enumerate(seeds):
        assert torch.equal(noise[i], draw([seed], (2, 3))[0])
        assert all(torch.equal(noise[i], noise[j]) == (seed == seeds[j]) for j in range(len(seeds)))


SEED_LISTS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6)


def test_noise_depends_on_its_seed_alone():
    holds(partial(check_noise_is_a_seeds_own, draw_noise), SEED_LISTS)


def test_the_noise_check_sees_one_stream_for_the_batch():
    refuted(partial(check_noise_is_a_seeds_own, one_stream_for_the_batch), SEED_LISTS)


def test_derived_seeds_are_the_same_on_every_machine():
    assert derive_seed(0, "step", 3) == 3296300929890211546
    assert len({derive_seed(s, n, i) for s in range(5) for n in ("a", "b") for i in range(5)}) == 50


# clips


@lru_cache
def generator() -> ShapesGenerator:
    """Weights in float64, so that batch shapes differ in rounding far below the tolerance."""
    return tiny_generator(torch.float64)


def check_clips_do_not_depend_on_the_batch(plans: list[GroupPlan], per_rollout: int) -> None:
    whole = roll_out(generator(), plans, Consistency())[Endpoints]
    parts = [
        roll_out(generator(), plans[i : i + per_rollout], Consistency())[Endpoints]
        for i in range(0, len(plans), per_rollout)
    ]
    close(torch.cat([part.latents for part in parts]), whole.latents, atol=1e-5)
    if whole.prefix is not None:
        close(torch.cat([part.prefix for part in parts]), whole.prefix, atol=1e-5)


@over(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.integers(1, 2), examples=8)
def test_a_clip_is_the_same_in_any_rollout(groups: int, branches: int, prefix: int, per_rollout: int):
    plans = group_plans(PROMPTS[:groups], branches, prefix, blocks=2, seed=3)
    check_clips_do_not_depend_on_the_batch(plans, per_rollout)


def test_the_clip_check_sees_noise_that_depends_on_the_batch(monkeypatch):
    monkeypatch.setattr("framework.rollout.draw_noise", one_stream_for_the_batch)
    with pytest.raises(AssertionError):
        check_clips_do_not_depend_on_the_batch(group_plans(PROMPTS[:3], 2, blocks=2), 1)


def evaluated(scenes: Sequence[Scene], clips_per_batch: int) -> dict[str, Tensor]:
    return evaluate_policy(
        generator(), Brightness(), scenes, members=2, seed=5, blocks=2, clips_per_batch=clips_per_batch
    ).scores


EVALUATED = tuple(Scene.single(prompt) for prompt in PROMPTS[:3])


def check_evaluation_does_not_depend_on_the_batch(clips_per_batch: int) -> None:
    for name, value in evaluated(EVALUATED, clips_per_batch).items():
        close(value, evaluated(EVALUATED, 48)[name], atol=1e-5)


@pytest.mark.parametrize("clips_per_batch", [1, 3, 4, 5])
def test_evaluation_is_the_same_for_any_batch_size(clips_per_batch: int):
    check_evaluation_does_not_depend_on_the_batch(clips_per_batch)


def test_the_evaluation_check_sees_noise_that_depends_on_the_batch(monkeypatch):
    monkeypatch.setattr("framework.rollout.draw_noise", one_stream_for_the_batch)
    with pytest.raises(AssertionError):
        check_evaluation_does_not_depend_on_the_batch(1)


def test_evaluation_noise_belongs_to_scene_and_member():
    forward, backward = evaluated(EVALUATED, 4), evaluated(EVALUATED[::-1], 4)
    for name in forward:
        close(forward[name], backward[name].flip(0), atol=1e-5)
    fewer, more = (evaluation_plans(EVALUATED, members, 5, 2) for members in (2, 4))
    for few, many in zip(fewer, more, strict=True):
        assert few.branches == many.branches[:2] and len({b.noise_seed for b in many.branches}) == 4
    assert evaluation_plans(EVALUATED, 2, 6, 2)[0].branches != fewer[0].branches
