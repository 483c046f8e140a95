"""A routing plan names frames that exist, differ between branches and leave the sink, the recent frames and the prompt
alone; everything else the branches of a group share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from framework.interfaces import GeneratorRecipe
from framework.kernels import Consistency, Ode
from framework.records import Anchors, Displacements, Endpoints, Transitions
from framework.rng import Streams
from framework.schedules import FewStepSchedule
from framework.types import BranchPlan, GroupPlan, Route, Scene, Segment
from strategies.exploration.causal_history_routing import (
    CausalHistoryRouting,
    CyclicWindows,
    IndependentDraws,
    RouteDraw,
    routable,
)
from tests.support import PROMPTS, holds, over, refuted

SEEDS = st.integers(0, 2**20)
DRAWS = (IndependentDraws(), CyclicWindows())


def recipe_of(block: int = 3, steps: int = 4, blocks: int = 12) -> GeneratorRecipe:
    grid = FewStepSchedule(tuple(1000 - 1000 * k // steps for k in range(steps)))
    return GeneratorRecipe("plans", block, blocks, (3, 4, 4), grid)


def scenes_of(count: int, *switches: int) -> list[Scene]:
    """Scenes that switch their prompt at these frames."""
    starts = (0, *switches)
    return [
        Scene(prompt, tuple(Segment(f"{prompt} {i}", start) for i, start in enumerate(starts)))
        for prompt in PROMPTS[:count]
    ]


@st.composite
def routings(draw) -> tuple[CausalHistoryRouting, GeneratorRecipe]:
    """Routings with a stream long enough for some pivot."""
    block, frames, recent, sink = (draw(st.integers(low, 4)) for low in (1, 1, 0, 0))
    resident = draw(st.none() | st.integers(frames + recent + 1, frames + recent + 9))
    routed, tail = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    needed = (sink + frames + recent + 1 + block - 1) // block + routed + tail
    stream = draw(st.none() | st.integers(needed, needed + 5))
    routing = CausalHistoryRouting(
        group_size=draw(st.integers(2, 6)), routed_frames=frames, recent=recent, sink=sink, routed_blocks=routed,
        tail_blocks=tail, stream_blocks=stream, resident=resident, draw=draw(st.sampled_from(DRAWS)),
    )  # fmt: skip
    return routing, recipe_of(block, blocks=needed if stream is None else 1)


def planned(routing: CausalHistoryRouting, recipe: GeneratorRecipe, seed: int, groups: int = 2) -> list[GroupPlan]:
    return list(routing.plan(scenes_of(groups), [5 + g for g in range(groups)], recipe, Streams(seed)))


# Every plan is valid


Planner = Callable[[CausalHistoryRouting, GeneratorRecipe, int], list[GroupPlan]]


def check_plans_are_valid(plan: Planner, made: tuple[CausalHistoryRouting, GeneratorRecipe], seed: int) -> None:
    """Word by word: in all routed blocks the frames exist, none repeats, sink and recent ones are there."""
    routing, recipe = made
    for group in plan(routing, recipe, seed):
        first, size = group.first_block * recipe.block_frames, recipe.block_frames
        stream = recipe.clip_blocks if routing.stream_blocks is None else routing.stream_blocks
        assert group.blocks == routing.routed_blocks + routing.tail_blocks
        assert group.first_block + group.blocks <= stream
        for branch in group.branches[:-1]:
            assert branch.route is not None and not branch.anchor
            assert len(branch.route.frames) == routing.routed_frames
            assert all(routing.sink <= f < first - routing.recent for f in branch.route.frames)
            if routing.resident is not None:
                assert min(branch.route.frames) >= first - routing.resident
            for block in range(branch.route.blocks):
                start = first + block * size
                seen = branch.route.visible(start)
                assert list(seen) == sorted(set(seen)) and seen[-1] < start
                assert len(seen) == routing.sink + routing.routed_frames + routing.recent
                assert set(range(routing.sink)) <= set(seen)
                assert {f for f in range(start) if start - f <= routing.recent} <= set(seen)


def counting_the_block_as_recent(routing: CausalHistoryRouting, recipe: GeneratorRecipe, seed: int) -> list[GroupPlan]:
    """A planted error, the released one: the nearest frames include the current block."""
    short = replace(routing, recent=max(0, routing.recent - recipe.block_frames))
    plans = planned(short, recipe, seed)

    def shown(branch: BranchPlan) -> BranchPlan:
        return branch if branch.route is None else replace(branch, route=replace(branch.route, recent=routing.recent))

    return [replace(plan, branches=tuple(map(shown, plan.branches))) for plan in plans]


def routing_the_sink(routing: CausalHistoryRouting, recipe: GeneratorRecipe, seed: int) -> list[GroupPlan]:
    """A planted error: the sink is part of the pool."""
    return planned(replace(routing, sink=0), recipe, seed)


def test_every_random_plan_is_valid():
    holds(partial(check_plans_are_valid, planned), routings(), SEEDS, examples=60)


@pytest.mark.parametrize("planter", [counting_the_block_as_recent, routing_the_sink])
def test_the_validity_check_sees_the_released_misreadings(planter: Planner):
    refuted(partial(check_plans_are_valid, planter), routings(), SEEDS)


@over(st.integers(0, 30), st.integers(0, 5), st.integers(0, 5), st.none() | st.integers(1, 12), st.integers(0, 12))
def test_the_pool_is_what_is_older_stored_and_of_the_prompt(start, sink, recent, resident, since):
    expected = [
        f for f in range(start)
        if f >= sink and f >= since and start - f > recent and (resident is None or start - f <= resident)
    ]  # fmt: skip
    assert routable(start, sink, recent, resident, since) == tuple(expected)


# Draws


def check_only_the_route_differs(plans: Sequence[GroupPlan]) -> None:
    """Branches share the seed of their noise; the anchor comes last and is the only one without a route."""
    for plan in plans:
        assert len({branch.noise_seed for branch in plan.branches}) == 1
        assert [branch.anchor for branch in plan.branches] == [False] * (len(plan.branches) - 1) + [True]
        assert plan.branches[-1].route is None
        bare = {replace(b, route=replace(b.route, frames=())) for b in plan.branches[:-1] if b.route is not None}
        assert len(bare) == 1 and all(b.route is not None for b in plan.branches[:-1])
    assert len({plan.first_block for plan in plans}) == 1
    assert len({plan.prefix_seed for plan in plans}) == len({b.noise_seed for p in plans for b in p.branches})
    assert len({plan.prefix_seed for plan in plans}) == len(plans)


@over(routings(), SEEDS)
def test_branches_differ_in_their_route_and_groups_share_their_pivot(made, seed: int):
    check_only_the_route_differs(planned(*made, seed, groups=4))


def test_the_sharing_check_sees_other_seeds_and_other_pivots():
    plans = planned(CausalHistoryRouting(routed_blocks=2), recipe_of(), 0)
    check_only_the_route_differs(plans)
    first = plans[0].branches
    other_noise = replace(plans[0], branches=(replace(first[0], noise_seed=1), *first[1:]))
    for wrong in ([other_noise, plans[1]], [replace(plans[0], first_block=0), plans[1]], [plans[0], plans[0]]):
        with pytest.raises(AssertionError):
            check_only_the_route_differs(wrong)


def test_a_plan_depends_on_seed_and_group_and_not_on_its_neighbours():
    routing, recipe = CausalHistoryRouting(routed_blocks=2), recipe_of()
    both = planned(routing, recipe, 3)
    (alone,) = routing.plan(scenes_of(2)[1:], [6], recipe, Streams(3))
    assert both[1] == alone and planned(routing, recipe, 4) != both
    pivots = {planned(routing, recipe, seed)[0].first_block for seed in range(60)}
    assert pivots == set(routing.pivots(scenes_of(1)[0], recipe))


def test_records_follow_the_kernel():
    always = {Endpoints, Displacements, Anchors}
    assert CausalHistoryRouting(kernel=Ode()).writes() == always
    assert CausalHistoryRouting(kernel=Consistency()).writes() == always | {Transitions}


@pytest.mark.parametrize(
    ("count", "given", "expected"),
    [(4, None, (1, 1, 0, 0)), (2, None, (1, 0)), (8, None, (1, 1, 1, 1, 0, 0, 0, 0)), (4, (0, 1, 0, 1), (0, 1, 0, 1))],
)
def test_steps_are_the_first_half_unless_given(count: int, given, expected):
    routing = CausalHistoryRouting(steps=None if given is None else tuple(map(bool, given)), routed_blocks=2)
    assert routing.routed_steps(recipe_of(steps=count)) == tuple(map(bool, expected))
    plan = planned(routing, recipe_of(steps=count), 0)[0]
    assert plan.branches[0].route is not None and plan.branches[0].route.steps == tuple(map(bool, expected))


# Prompts


def check_no_window_contains_a_switch(routing: CausalHistoryRouting, recipe: GeneratorRecipe, scene: Scene) -> None:
    """Neither the window nor, unless asked, a routed frame reaches over a switch, where it takes effect."""
    size = recipe.block_frames
    effective = [-(-segment.start // size) * size for segment in scene.segments]
    for pivot in routing.pivots(scene, recipe):
        first, last = pivot * size, (pivot + routing.routed_blocks + routing.tail_blocks) * size - 1
        assert not any(first < start <= last for start in effective)
        since = max(start for start in effective if start <= first)
        pool = routing.pool(scene.on_blocks(size), first)
        if not routing.across_prompts:
            assert all(frame >= since for frame in pool)
        assert len(pool) > routing.routed_frames


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("switches", [(18,), (15, 33), (17, 34)])
def test_no_route_reaches_over_a_prompt_switch_unless_asked(across: bool, switches: tuple[int, ...]):
    routing = CausalHistoryRouting(
        routed_frames=2, recent=2, sink=1, routed_blocks=2, stream_blocks=20, across_prompts=across
    )
    (scene,) = scenes_of(1, *switches)
    check_no_window_contains_a_switch(routing, recipe_of(), scene)
    plain = set(routing.pivots(scenes_of(1)[0], recipe_of()))
    found = set(routing.pivots(scene, recipe_of()))
    at_a_switch = {-(-frame // 3) for frame in switches}
    assert found < plain and (at_a_switch <= found) == across


def test_the_prompt_check_sees_a_planner_that_looks_at_the_first_prompt_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Scene, "segment_at", lambda self, frame: self.segments[0])
    routing = CausalHistoryRouting(routed_frames=2, recent=2, sink=1, routed_blocks=2, stream_blocks=20)
    with pytest.raises(AssertionError):
        check_no_window_contains_a_switch(routing, recipe_of(), scenes_of(1, 18)[0])


def test_the_prompt_check_sees_a_switch_that_takes_effect_within_a_block(monkeypatch: pytest.MonkeyPatch):
    routing = CausalHistoryRouting(routed_frames=2, recent=2, sink=1, routed_blocks=2, stream_blocks=20)
    (scene,) = scenes_of(1, 17)
    monkeypatch.setattr(Scene, "on_blocks", lambda self, size: self)
    with pytest.raises(AssertionError):
        check_no_window_contains_a_switch(routing, recipe_of(), scene)


def test_a_pivot_suits_all_prompts_of_the_step():
    routing = CausalHistoryRouting(routed_frames=2, recent=1, sink=1, routed_blocks=1, stream_blocks=12)
    scenes = [*scenes_of(1), *scenes_of(2, 9)[1:], *scenes_of(3, 24)[2:]]
    allowed = set.intersection(*(set(routing.pivots(scene, recipe_of())) for scene in scenes))
    found = {routing.plan(scenes, [0, 1, 2], recipe_of(), Streams(seed))[0].first_block for seed in range(60)}
    assert found == allowed


# Refusals: one line that names the parameter


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"group_size": 1}, "group_size=1"),
        ({"routed_frames": 0}, "routed_frames"),
        ({"recent": -1}, "recent"),
        ({"sink": -1}, "sink"),
        ({"routed_blocks": 0}, "routed_blocks"),
        ({"tail_blocks": -1}, "tail_blocks"),
        ({"routed_frames": 4, "recent": 2, "resident": 6}, "resident=6"),
    ],
)
def test_settings_without_meaning_are_refused(setting: dict, name: str):
    with pytest.raises(ValueError, match=rf"CausalHistoryRouting\.{name}") as refusal:
        CausalHistoryRouting(**setting)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("steps", [(True,), (False,) * 4, (True,) * 5])
def test_a_mask_that_is_no_mask_of_the_sampler_is_refused(steps: tuple[bool, ...]):
    with pytest.raises(ValueError, match=r"CausalHistoryRouting\.steps needs one flag for each of the sampler's 4"):
        planned(CausalHistoryRouting(steps=steps, routed_blocks=1), recipe_of(), 0)


@pytest.mark.parametrize(
    "setting",
    [{"stream_blocks": 8}, {"routed_frames": 30}, {"routed_blocks": 11}, {"stream_blocks": 5, "routed_blocks": 1}],
)
def test_a_stream_without_a_pivot_is_refused(setting: dict):
    with pytest.raises(ValueError, match=r"finds no pivot in a stream of .* raise stream_blocks") as refusal:
        planned(CausalHistoryRouting(**setting), recipe_of(), 0)
    assert "\n" not in str(refusal.value)


def test_a_pool_that_leaves_no_choice_gives_no_pivot():
    """With exactly as many frames as a route all branches would be equal: the first pivot has one more."""
    routing = CausalHistoryRouting(routed_frames=6, recent=3, sink=3, routed_blocks=1)
    assert min(routing.pivots(scenes_of(1)[0], recipe_of(block=1, blocks=20))) == 13


def test_prompts_whose_switches_leave_no_common_pivot_are_refused():
    routing = CausalHistoryRouting(routed_frames=2, recent=1, sink=1, routed_blocks=3, stream_blocks=8)
    scenes = [*scenes_of(1, 15), *scenes_of(2, 9)[1:]]
    with pytest.raises(ValueError, match="no pivot that suits all prompts of the step"):
        routing.plan(scenes, [0, 1], recipe_of(), Streams(0))


class Repeating(RouteDraw):
    """A user's draw that draws with replacement."""

    def draw(self, pool: Sequence[int], frames: int, branches: int, streams: Streams) -> list[tuple[int, ...]]:
        places = torch.randint(len(pool), (branches, frames), generator=streams("draw"))
        return [tuple(sorted(pool[i] for i in row)) for row in places.tolist()]


class Careless(RouteDraw):
    """A user's draw that forgets the pool."""

    def draw(self, pool: Sequence[int], frames: int, branches: int, streams: Streams) -> list[tuple[int, ...]]:
        return [tuple(range(frames))] * branches


@pytest.mark.parametrize("draw", [Careless(), Repeating()])
def test_a_draw_that_leaves_the_pool_or_repeats_is_refused(draw: RouteDraw):
    routing = CausalHistoryRouting(routed_blocks=1, draw=draw)
    with pytest.raises(ValueError, match=rf"{type(draw).__name__}\.draw gave a branch the frames"):
        planned(routing, recipe_of(), 0)


def test_a_route_shows_sink_routed_and_recent_frames_in_order():
    route = Route((5, 8), sink=2, recent=3, blocks=2, steps=(True,))
    assert route.visible(15) == (0, 1, 5, 8, 12, 13, 14)
    assert route.visible(18) == (0, 1, 5, 8, 15, 16, 17)
