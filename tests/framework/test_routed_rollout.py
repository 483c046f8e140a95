"""A routed rollout fetches the frames that its plan names, in the steps it names, and nothing else differs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from backbones import visible as reading
from backbones.embedded.generator import ShapesGenerator
from backbones.history import FullHistory, HistoryPolicy, KVHistory, SinkWindow
from backbones.streaming import WanStream
from backbones.visible import Chunk
from framework.kernels import Consistency
from framework.records import Anchors, Displacements, Endpoints, Predictions, Transitions
from framework.rollout import canonical, resident_frames, roll_out
from framework.types import GroupPlan, Tape, Visible
from tests.routed import PIVOTS, ROUTING, WINDOW, plans_at, rerouted, rolled
from tests.support import close, tiny_generator

# Routing off


def check_all_are_the_anchor(latents: Tensor, plans: Sequence[GroupPlan]) -> None:
    """Bit for bit, the whole window."""
    for clips in latents.split(len(plans[0].branches)):
        assert all(torch.equal(clip, clips[-1]) for clip in clips)


@pytest.mark.parametrize("policy", [WINDOW, SinkWindow(1, 7, relative=True), FullHistory()])
@pytest.mark.parametrize("pivot", PIVOTS.values(), ids=PIVOTS)
def test_with_routing_off_every_branch_is_the_anchor_bit_for_bit(policy: HistoryPolicy, pivot: int):
    plans = plans_at(pivot)
    off = rolled(canonical(plans), policy)[Endpoints].latents
    check_all_are_the_anchor(off, plans)
    # a route that is shown in no step and no clean pass is no route either
    idle = [
        replace(
            p, branches=tuple(replace(b, route=b.route and replace(b.route, steps=(False,) * 4)) for b in p.branches)
        )
        for p in plans
    ]
    assert torch.equal(rolled(idle, policy)[Endpoints].latents, off)
    # nor is the anchor of a routed group anybody else
    routed = rolled(plans, policy)[Endpoints].latents
    close(routed[3::4], off[3::4], atol=1e-12)
    with pytest.raises(AssertionError):
        check_all_are_the_anchor(routed, plans)


def test_a_route_to_what_the_policy_shows_is_no_route():
    """Of a window of one block: its sink, then the three frames before it."""
    plans = plans_at(4, replace(ROUTING, routed_blocks=1, tail_blocks=0))

    def shown(frames: tuple[int, ...]) -> Tensor:
        same = [
            replace(
                p, branches=tuple(replace(b, route=b.route and replace(b.route, frames=frames)) for b in p.branches)
            )
            for p in plans
        ]
        return rolled(same)[Endpoints].latents

    off = rolled(canonical(plans))[Endpoints].latents
    close(shown((9,)), off, atol=1e-12)  # 0 | 9 | 10, 11
    with pytest.raises(AssertionError):
        close(shown((8,)), off, atol=1e-12)


# The sink


def check_refused_or_generated(plans: Sequence[GroupPlan], policy: HistoryPolicy, sink: int) -> None:
    """A sink that the policy keeps can be shown at any block; a longer one is refused before the first."""
    kept = {SinkWindow: 1, FullHistory: sink}[type(policy)]
    try:
        rolled(rerouted(plans, sink=sink), policy)
    except ValueError as error:
        assert sink > kept and "\n" not in str(error)
        assert f"CausalHistoryRouting.sink={sink}" in str(error) and f"set sink to at most {kept}" in str(error)
    else:
        assert sink <= kept


@pytest.mark.parametrize("policy", [WINDOW, SinkWindow(1, 7, relative=True), FullHistory()])
@pytest.mark.parametrize("pivot", PIVOTS.values(), ids=PIVOTS)
def test_a_longer_sink_than_the_policy_keeps_is_refused_whether_or_not_the_window_has_rolled(
    policy: HistoryPolicy, pivot: int, monkeypatch: pytest.MonkeyPatch
):
    plans = plans_at(pivot)
    for sink in range(3):
        check_refused_or_generated(plans, policy, sink)
    monkeypatch.setattr(ShapesGenerator, "check_plan", lambda self, plan: None)
    if policy != FullHistory():
        # unchecked, an early window finds all frames, and a late one does not find the second block's
        recent = rerouted(plans, frames=(3 * pivot - 4, 3 * pivot - 3))
        with pytest.raises(AssertionError if pivot == 2 else KeyError):
            check_refused_or_generated(recent, policy, 4)


# What branches share


def check_noise_is_shared(tape: Tape, group: int = 4) -> None:
    """The first state, and every fresh draw of every block, in all branches of a group; groups differ."""
    steps = tape[Transitions]
    predicted = tape[Displacements].velocities
    kinds = [steps.states[:, 0]]
    for k, (sigma, sigma_next) in enumerate(steps.grid):
        std = steps.kernel.std(sigma, sigma_next)
        if std > 0:
            mean = steps.kernel.mean(steps.states[:, k], predicted[:, k], sigma, sigma_next)
            kinds.append((steps.next_states[:, k] - mean) / std)
    for noise in kinds:
        first, second = noise.split(group)
        for clips in (first, second):
            close(clips, clips[-1:].expand_as(clips), atol=1e-5)
        assert float((first - second).abs().max()) > 1


def check_prefix_is_shared(tape: Tape, plans: Sequence[GroupPlan]) -> None:
    """One prefix a group, the one that is made without any route."""
    prefix, plain = tape[Endpoints].prefix, rolled(canonical(plans))[Endpoints].prefix
    assert prefix is not None and plain is not None and len(prefix) == len(plans)
    assert torch.equal(prefix, plain)


@pytest.mark.parametrize("pivot", PIVOTS.values(), ids=PIVOTS)
def test_branches_of_a_group_share_every_noise_and_the_prefix(pivot: int):
    plans = plans_at(pivot)
    tape = rolled(plans)
    check_noise_is_shared(tape)
    check_prefix_is_shared(tape, plans)
    latents = tape[Endpoints].latents.unflatten(0, (2, 4))
    assert all(
        float((latents[:, i] - latents[:, j]).abs().max()) > 1e-4 for i in range(4) for j in range(i)
    )  # and yet they differ: by their routes


def test_the_sharing_checks_see_other_noise_and_other_prefixes():
    plans = plans_at(2)
    branches = plans[0].branches
    other = [replace(plans[0], branches=(replace(branches[0], noise_seed=5), *branches[1:])), plans[1]]
    with pytest.raises(AssertionError):
        check_noise_is_shared(rolled(other))
    with pytest.raises(AssertionError):
        check_prefix_is_shared(rolled([replace(plans[0], prefix_seed=5), plans[1]]), plans)


# What is fetched: the values of every stored frame are its id


@dataclass(frozen=True)
class Call:
    """One network call of the window. step: of the sampler, None for the clean pass. seen: ids per clip, as read."""

    start: int
    step: int | None
    seen: dict[int, tuple[int, ...]]
    resident: tuple[int, ...]


class Marked(ShapesGenerator):
    """A generator whose stored values are frame ids, and which remembers what attention was given."""

    calls: list[Call]

    def predict(self, x: Tensor, sigma: float, stream: WanStream, visible: Visible | None = None) -> Tensor:
        out = super().predict(x, sigma, stream, visible)
        self.calls.append(self._read(x, stream, visible, self.recipe.schedule.sigmas.index(sigma)))
        return out

    def commit(self, x0: Tensor, stream: WanStream, visible: Visible | None = None) -> WanStream:
        after = super().commit(x0, stream, visible)
        self.calls.append(self._read(x0, stream, visible, None))
        *older, last = after.history.chunks
        ids = torch.arange(last.start, last.stop).to(x0).view(1, -1, 1, 1, 1)
        marked = Chunk(last.start, tuple((k, ids.expand_as(v).contiguous()) for k, v in last.kv))
        return replace(after, history=KVHistory((*older, marked), after.history.branches))

    def _read(self, x: Tensor, stream: WanStream, visible: Visible | None, step: int | None) -> Call:
        """The values that the first layer's attention was given."""
        seen = {}
        for visit in stream.memo[(x.shape[2], None if visible is None else tuple(visible))]:
            rows = range(len(x)) if visit.rows is None else visit.rows.tolist()
            values = next((v for (layer, _), (_, v) in _rotated(visit.past.memo) if layer == 0), None)
            for i, row in enumerate(rows):
                seen[row] = () if values is None else tuple(int(id) for id in values[i, :, 0, 0, 0])
        return Call(stream.next_frame, step, seen, stream.history.frame_ids)


def _rotated(memo: dict) -> list[tuple]:
    return [(key, value) for key, value in memo.items() if isinstance(key[0], int)]


def calls_of(plans: Sequence[GroupPlan], policy: HistoryPolicy = WINDOW) -> list[Call]:
    """The calls of the window."""
    plain = tiny_generator(torch.float64, policy=policy)
    generator = Marked(plain.network, policy)
    generator.calls = []
    roll_out(generator, plans, Consistency(), frozenset({Endpoints}))
    return [call for call in generator.calls if call.start >= 3 * plans[0].first_block]


def check_fetched(plans: Sequence[GroupPlan], calls: Sequence[Call]) -> None:
    """In each call each clip read what its plan says: its route where and when it holds, else what the policy shows."""
    branches = [branch for plan in plans for branch in plan.branches]
    first = 3 * plans[0].first_block
    assert [call.step for call in calls] == [0, 1, 2, 3, None] * (plans[0].blocks - 1) + [0, 1, 2, 3]
    for call in calls:
        default = tuple(f for f in range(call.start) if f == 0 or f >= call.start - 3)
        for row, branch in enumerate(branches):
            route, expected = branch.route, default
            inside = route is not None and (call.start - first) // 3 < route.blocks
            if route is not None and inside and (route.clean_write if call.step is None else route.steps[call.step]):
                recent = range(call.start - route.recent, call.start)
                expected = tuple(sorted({*range(route.sink), *route.frames, *recent}))
            assert call.seen[row] == expected


MASKS = [(None, False), (None, True), ((True,) * 4, True), ((False, True, False, True), False)]


@pytest.mark.parametrize("pivot", PIVOTS.values(), ids=PIVOTS)
@pytest.mark.parametrize(("steps", "clean_write"), MASKS)
def test_the_frames_fetched_are_the_frames_planned(pivot: int, steps: tuple[bool, ...] | None, clean_write: bool):
    """For every clip of a batch in which routes, and an anchor, see different numbers of frames."""
    plans = plans_at(pivot, replace(ROUTING, steps=steps, clean_write=clean_write, tail_blocks=2))
    check_fetched(plans, calls_of(plans))


def test_routes_as_long_as_the_canonical_history_are_fetched_too():
    """Then routed clips and anchors are one call."""
    plans = plans_at(5, replace(ROUTING, routed_frames=1))
    calls = calls_of(plans)
    assert len({len(seen) for seen in calls[0].seen.values()}) == 1
    check_fetched(plans, calls)


def shifted(shift: int) -> Callable:
    """A planted error, the released one: once the cache rolls, slot arithmetic is one block off."""
    honest = reading.locate

    def locate(chunks: tuple[Chunk, ...], frames: Sequence[int]) -> list[tuple[int, int]]:
        resident = {i for chunk in chunks for i in range(chunk.start, chunk.stop)}
        rolled_by = shift if resident and len(resident) < max(resident) + 1 else 0
        return honest(chunks, [f + rolled_by if f > 0 and f + rolled_by in resident else f for f in frames])

    return locate


def test_the_fetch_check_sees_frames_that_are_one_block_off_once_the_cache_rolls(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "locate", shifted(3))
    late, early = plans_at(5, replace(ROUTING, resident=8)), plans_at(2)
    check_fetched(early, calls_of(early))
    with pytest.raises(AssertionError):
        check_fetched(late, calls_of(late))


@pytest.mark.parametrize(
    "planted",
    [
        {"steps": (True, True, True, False)},
        {"clean_write": True},
        {"blocks": 3},
        {"blocks": 1},
        {"recent": 1},
        {"frames": (1, 2)},
    ],
    ids=str,
)
def test_the_fetch_check_sees_another_route(planted: dict):
    plans = plans_at(5)
    wrong = rerouted(plans, **planted)
    with pytest.raises(AssertionError):
        check_fetched(plans, calls_of(wrong))


# Memory


def check_resident(plans: Sequence[GroupPlan], calls: Sequence[Call]) -> None:
    """At the last routed block there is what the policy may show, the oldest routed frame's chunk, and what follows."""
    routes = [branch.route for plan in plans for branch in plan.branches if branch.route is not None]
    last = 3 * (plans[0].first_block + routes[0].blocks - 1)
    oldest = min(min(route.frames) for route in routes)
    (resident,) = {call.resident for call in calls if call.start == last}
    chunks = [(f, f + 1, f + 2) for f in range(0, last, 3)]
    kept = [c for c in chunks if c[-1] >= oldest or any(WINDOW.retains(f, last) for f in c)]
    assert resident == tuple(f for c in kept for f in c)


@pytest.mark.parametrize("seed", range(1, 400, 80))
def test_the_history_keeps_exactly_what_routes_can_reach(seed: int):
    plans = plans_at(5, replace(ROUTING, resident=9), seed=seed)
    calls = calls_of(plans)
    check_resident(plans, calls)
    tail = [call.resident for call in calls if call.start == 3 * (plans[0].first_block + 2)]
    assert all(len(ids) <= len(calls[0].resident) + 3 for ids in tail)


def test_the_memory_check_sees_a_block_too_many_and_one_too_few_is_a_missing_frame(monkeypatch: pytest.MonkeyPatch):
    plans = plans_at(5, replace(ROUTING, resident=9))
    for off, error in ((3, AssertionError), (-3, KeyError)):
        monkeypatch.setattr(
            "framework.rollout.resident_frames", lambda plans, size, off=off: resident_frames(plans, size) + off
        )
        with pytest.raises(error):
            check_resident(plans, calls_of(plans))


def test_unrouted_plans_keep_nothing_beside_what_the_policy_shows():
    plans = plans_at(5)
    assert resident_frames(canonical(plans), 3) == 0
    calls = calls_of(canonical(plans))
    assert all(f == 0 or f > call.start - 9 or f < 3 for call in calls for f in call.resident)


# Records


def test_a_routed_rollout_writes_displacements_and_never_claims_to_be_on_policy():
    plans = plans_at(2)
    tape = rolled(plans, keep=frozenset({Displacements, Anchors, Predictions, Transitions}))
    assert set(tape.records) == {Endpoints, Displacements, Anchors, Transitions}
    moved = tape[Displacements]
    assert (moved.blocks, moved.steps) == (2, (True, True, False, False))
    assert tape[Anchors].mask.tolist() == [False, False, False, True] * 2
    plain = rolled(canonical(plans), keep=frozenset({Displacements, Predictions, Transitions}))
    assert [kind.__name__ for kind in plain.records] == ["Endpoints", "Predictions", "OnPolicyTransitions"]
