"""A rollout whose prompts switch: when, for whom, what is stored under which prompt, and that replay agrees."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator
from backbones.history import FullHistory, HistoryPolicy, SinkWindow
from backbones.recache import BlockwiseRecache, CleanPass, JointRecache, MovedSinkRecache, NoRecache, Recache
from backbones.streaming import WanStream
from framework.commands.generate import generate
from framework.evaluation import decode_tape, evaluate_policy, evaluation_plans, segment_windows
from framework.interfaces import GeneratorRecipe
from framework.kernels import Consistency
from framework.records import Displacements, Endpoints, Predictions
from framework.rng import Streams
from framework.rollout import canonical, check_routes, roll_out
from framework.schedules import FewStepSchedule
from framework.selfchecks import check_replay, replay_deviation, replay_probes
from framework.types import GroupPlan, Scene, Segment, Tape, VideoBatch, Window
from rewards.shapes import ShapesReward
from strategies.exploration.causal_history_routing import CausalHistoryRouting
from strategies.surrogates.gaussian_kernel import GaussianReinforce
from strategies.surrogates.gibbs_tve import GibbsTVE
from strategies.surrogates.nft import NFT
from tests.support import PROMPTS, Brightness, close, group_plans, holds, refuted, tiny_generator

OLD, NEW, OTHER = PROMPTS[:3]
ALL = frozenset({Endpoints, Predictions})
POLICY = SinkWindow(sink=3, window=9, relative=True)


def scene(*segments: tuple[str, int]) -> Scene:
    return Scene(" | ".join(prompt for prompt, _ in segments), tuple(Segment(*segment) for segment in segments))


def switching(frame: int) -> Scene:
    return scene((OLD, 0), (NEW, frame))


def generator_of(recache: Recache, policy: HistoryPolicy = POLICY) -> ShapesGenerator:
    generator = tiny_generator(torch.float64, policy=policy)
    generator.recache = recache
    return generator


def plans_of(scenes: Sequence[Scene], first_block: int, blocks: int, branches: int = 2) -> list[GroupPlan]:
    plans = group_plans([s.prompt for s in scenes], branches, first_block, blocks)
    return [replace(plan, scene=s) for plan, s in zip(plans, scenes, strict=True)]


# Scenes on blocks


def check_on_blocks(cut: Callable[[Scene, int], Scene], starts: list[int], block: int) -> None:
    """Frame by frame: the prompt of a block is the last one that was asked for by its first frame."""
    asked = scene(*((f"prompt {i}", start) for i, start in enumerate(starts)))
    found = cut(asked, block)
    for first in range(0, starts[-1] + 2 * block, block):
        expected = [s.prompt for s in asked.segments if s.start <= first][-1]
        assert found.segment_at(first).prompt == found.segment_at(first + block - 1).prompt == expected
        before = found.segment_at(first - 1).prompt if first else expected
        assert found.switch_at(first) == (expected if expected != before else None)


STARTS = st.lists(st.integers(1, 30), unique=True, max_size=4).map(lambda later: [0, *sorted(later)])


def test_a_prompt_holds_from_the_first_block_that_starts_at_its_frame_or_later():
    holds(lambda starts, block: check_on_blocks(Scene.on_blocks, starts, block), STARTS, st.integers(1, 4))


def test_the_block_check_sees_a_switch_that_comes_a_block_early():
    def early(asked: Scene, block: int) -> Scene:
        starts = {s.start // block * block: s.prompt for s in asked.segments}
        return scene(*((prompt, start) for start, prompt in starts.items()))

    refuted(lambda starts, block: check_on_blocks(early, starts, block), STARTS, st.integers(1, 4))


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 6, 3)])
def test_segments_that_do_not_rise_from_frame_0_are_refused(starts: tuple[int, ...]):
    with pytest.raises(ValueError, match="must start at frame 0"):
        scene(*((f"prompt {i}", start) for i, start in enumerate(starts)))


# Replay


WHERE = [  # switch frames of two scenes, blocks before the window
    ((6, 6), 3),  # before the window
    ((9, 9), 3),  # at its first frame
    ((8, 4), 3),  # each scene at its own block, given inside blocks
    ((9, 30), 3),  # one at the window, the other after it
    ((3, 9), 5),  # long ago, and what was encoded again has partly left the window
]


@pytest.mark.parametrize("recache", [JointRecache(), BlockwiseRecache(), NoRecache()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize(("frames", "prefix"), WHERE)
def test_replay_repeats_the_switches_of_the_rollout(recache: Recache, frames: tuple[int, int], prefix: int):
    generator = generator_of(recache)
    tape = roll_out(generator, plans_of([switching(f) for f in frames], prefix, 2), Consistency(), ALL)
    assert replay_deviation(generator, tape) < 1e-12


@pytest.mark.parametrize("policy", [POLICY, FullHistory(), SinkWindow(3, 9)], ids=["relative", "all", "absolute"])
def test_replay_repeats_a_sink_that_moved(policy: HistoryPolicy):
    generator = generator_of(MovedSinkRecache(), policy)
    scenes = [scene((OLD, 0), (NEW, 12), (OTHER, 18)), scene((NEW, 0), (OLD, 12), (NEW, 18))]
    for prefix in (4, 5, 6, 7):
        blocks = 2 if prefix != 5 else 1
        tape = roll_out(generator, plans_of(scenes, prefix, blocks), Consistency(), ALL)
        assert replay_deviation(generator, tape) < 1e-12


def test_replay_under_another_switch_or_another_recache_is_seen():
    generator = generator_of(JointRecache())
    tape = roll_out(generator, plans_of([switching(9)] * 2, 3, 2), Consistency(), ALL)
    single = [replace(plan, scene=Scene.single(OLD)) for plan in tape.plans]
    earlier = [replace(plan, scene=switching(6)) for plan in tape.plans]
    for wrong in (single, earlier):
        assert replay_deviation(generator, Tape(tuple(wrong), tape.records)) > 1e-4
    for other in (NoRecache(), BlockwiseRecache()):
        generator.recache = other
        with pytest.raises(ValueError, match="replaying a stored rollout gives other velocities"):
            check_replay(generator, tape, 1e-5)


def test_micro_batches_of_a_switched_rollout_are_its_rows():
    generator = generator_of(JointRecache())
    tape = roll_out(generator, plans_of([switching(9), switching(6)], 3, 2), Consistency(), ALL)
    probes = replay_probes(tape)
    with torch.no_grad():
        whole = generator.replay(probes)
        for clips in (1, 2, 4):
            close(torch.cat([generator.replay(part) for part in probes.split(clips)]), whole, atol=1e-12)


def test_the_text_of_a_switch_in_the_prefix_trains():
    generator = generator_of(JointRecache())
    tape = roll_out(generator, plans_of([switching(6)], 3, 1), Consistency(), ALL)
    generator.replay(replay_probes(tape)).square().mean().backward()
    for block in generator.network.blocks:
        gradient = block.attn2.to_k.weight.grad  # type: ignore[union-attr]
        assert gradient is not None and bool((gradient != 0).any())


# Whom a switch changes


def rolled(scenes: Sequence[Scene], recache: Recache, prefix: int = 1, blocks: int = 4) -> Tensor:
    tape = roll_out(generator_of(recache), plans_of(scenes, prefix, blocks), Consistency())
    return tape[Endpoints].latents


@pytest.mark.parametrize("recache", [JointRecache(), BlockwiseRecache(), NoRecache()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("frame", [3, 6, 9])
def test_a_scene_that_does_not_switch_is_unchanged_by_one_that_does(recache: Recache, frame: int):
    alone = rolled([Scene.single(OLD), Scene.single(OTHER)], recache)
    beside = rolled([switching(frame), Scene.single(OTHER)], recache)
    assert torch.equal(beside[2:], alone[2:])
    assert torch.equal(beside[:2, :, : frame - 3], alone[:2, :, : frame - 3])  # and nothing before the switch
    assert not torch.equal(beside[:2, :, frame - 3 :], alone[:2, :, frame - 3 :])


def test_a_switch_that_takes_effect_after_the_window_changes_nothing():
    never = rolled([Scene.single(OLD)], JointRecache())
    for frame in (13, 14, 15, 40):  # the window ends before frame 15
        assert torch.equal(rolled([switching(frame)], JointRecache()), never)
    assert not torch.equal(rolled([switching(12)], JointRecache()), never)


# How often, and under which prompt every slot is stored


class Recording(ShapesGenerator):
    """Writes down every pass that stores something: (frames, rows, prompt of each row) in order."""

    def begin(self) -> "Recording":
        self.passes: list[tuple[str, range, int]] = []
        self.slots: dict[int, dict[int, str]] = {}  # group → frame → the prompt it was stored under
        self.names: list[str] = []
        return self

    def open(self, prompts: Sequence[str], resident: int = 0, switches: bool = False) -> WanStream:
        self.names = list(prompts)
        self.slots = {g: {} for g in range(len(prompts))}
        return super().open(prompts, resident, switches)

    def switch(self, stream: WanStream, prompts: Sequence[str | None]) -> WanStream:
        self.owners = [g for g, prompt in enumerate(prompts) if prompt is not None]
        self.names = [prompt or name for prompt, name in zip(prompts, self.names, strict=True)]
        self.passes.append(("switch", range(stream.next_frame, stream.next_frame), stream.batch))
        return super().switch(stream, prompts)

    def _reencode(self, part: CleanPass, *behind):
        output, kv = super()._reencode(part, *behind)
        self.passes.append(("recache", part.frames, len(output)))
        for group in self.owners:
            self.slots[group] |= {frame: self.names[group] for frame in part.stored}
        return output, kv

    def commit(self, x0: Tensor, stream: WanStream, visible=None) -> WanStream:
        frames = range(stream.next_frame, stream.next_frame + x0.shape[2])
        for group, name in enumerate(self.names):
            self.slots[group] |= {frame: name for frame in frames}
        return super().commit(x0, stream, visible)

    def count(self, kind: str) -> list[tuple[int, int]]:
        """(frames of the pass or the frame of the switch, rows)."""
        return [(len(frames) or frames.start, rows) for k, frames, rows in self.passes if k == kind]


def recording(recache: Recache) -> Recording:
    plain = tiny_generator(policy=POLICY, clip_blocks=8)
    generator = Recording(plain.network, POLICY, recache).begin()
    generator.recipe = plain.recipe
    return generator


ROUTED = CausalHistoryRouting(
    group_size=2,
    routed_frames=2,
    recent=3,
    sink=3,
    routed_blocks=2,
    tail_blocks=1,
    stream_blocks=8,
    across_prompts=True,
)


def routed_at(generator: Recording, pivot: int, scenes: Sequence[Scene]) -> Tape:
    """Plans of the routing whose window starts at a block, rolled out."""
    for seed in range(200):
        plans = ROUTED.plan(scenes, range(len(scenes)), generator.recipe, Streams(seed))
        if plans[0].first_block == pivot:
            return roll_out(generator, plans, Consistency(), frozenset({Endpoints, Displacements}))
    raise AssertionError(f"no seed puts the window at block {pivot}")


def test_a_switch_at_the_pivot_of_a_routed_window_happens_once_a_prompt_before_the_fork():
    generator = recording(JointRecache())
    routed_at(generator, 5, [switching(15), switching(14)])  # 14 takes effect at 15 as well
    assert generator.count("switch") == [(15, 2)] and generator.count("recache") == [(9, 2)]
    assert [generator.slots[0][f] for f in range(15)] == [OLD] * 10 + [NEW] * 5  # sink 3; 9 is never seen again


def test_a_switch_before_a_routed_window_leaves_the_frames_since_then_under_the_new_prompt():
    generator = recording(JointRecache())
    routed_at(generator, 5, [switching(9), Scene.single(OLD)])
    assert generator.count("switch") == [(9, 2)] and generator.count("recache") == [(9, 1)]  # one row of two
    assert [generator.slots[0][f] for f in range(15)] == [NEW] * 3 + [OLD] + [NEW] * 11  # 3 is never seen again
    assert {generator.slots[1][f] for f in range(15)} == {OLD}


@pytest.mark.parametrize(
    ("recache", "under_new"),
    [
        (JointRecache(), set(range(10, 15))),
        (BlockwiseRecache(), {0, 1, 2, 12, 13, 14}),
        (NoRecache(), set()),
        (MovedSinkRecache(), {6, 7, 8, *range(10, 15)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_prompt_of_every_slot_at_a_pivot_that_is_a_switch(recache: Recache, under_new: set[int]):
    generator = recording(recache)
    roll_out(generator, plans_of([switching(15)] * 2, 5, 1), Consistency())
    assert {frame for frame in range(15) if generator.slots[0][frame] == NEW} == under_new
    visible = generator.recache.moved(POLICY, 15).visible(15, 3)
    if not isinstance(recache, NoRecache | JointRecache):
        assert set(visible) <= under_new  # what the next block sees is under the new prompt
    if isinstance(recache, JointRecache):
        assert set(visible) - under_new == {0, 1, 2}  # but for the sink, which keeps what it is


def test_a_switch_inside_a_rollout_happens_after_the_fork_to_every_branch():
    generator = recording(JointRecache())
    roll_out(generator, plans_of([switching(9), switching(12)], 2, 3, branches=3), Consistency())
    assert generator.count("switch") == [(9, 6), (12, 6)]
    assert generator.count("recache") == [(9, 3), (9, 3)]  # each for the branches of its own prompt


MOVED = r"MovedSinkRecache moved the sink that routes name; set recache=JointRecache\(\) to explore"


def test_a_route_behind_a_sink_that_moved_is_refused_before_anything_is_generated():
    generator = recording(MovedSinkRecache())
    with pytest.raises(ValueError, match=MOVED) as refusal:
        routed_at(generator, 5, [switching(12)])
    assert "\n" not in str(refusal.value) and "frame 12" in str(refusal.value)
    assert not generator.slots
    # whoever drives a stream by hand meets the same sentence
    stream = generator.open([OLD], switches=True)
    for _ in range(4):
        stream = generator.commit(torch.zeros(1, 3, 3, 16, 16), stream)
    stream = generator.switch(stream, [NEW])
    with pytest.raises(ValueError, match=MOVED):
        generator.predict(torch.zeros(1, 3, 3, 16, 16), 1.0, stream, [(0, 1, 2, 9, 10, 11)])


@pytest.mark.parametrize("frame", [9, 21])
def test_a_sink_that_stays_where_it_is_may_be_routed(frame: int):
    """At frame 9 the window of 9 holds the whole past; 21 is behind the window, which never meets it."""
    routed_at(recording(MovedSinkRecache()), 4, [switching(frame)])


def test_a_start_looks_for_moved_sinks_in_all_scenes():
    (plan,) = ROUTED.plan([Scene.single(OLD)], [0], recording(JointRecache()).recipe, Streams(0))
    scenes = [Scene.single(OLD), switching(9), switching(11)]
    with pytest.raises(ValueError, match=MOVED):
        check_routes(generator_of(MovedSinkRecache()), plan, scenes)  # 11 takes effect at 12
    check_routes(generator_of(MovedSinkRecache()), plan, scenes[:2])
    check_routes(generator_of(MovedSinkRecache()), canonical([plan])[0], scenes)
    check_routes(generator_of(JointRecache()), plan, scenes)


def test_a_switch_inside_a_routed_window_is_never_planned():
    for seed in range(60):
        (plan,) = ROUTED.plan([switching(14)], [0], recording(JointRecache()).recipe, Streams(seed))
        first, stop = plan.first_block * 3, (plan.first_block + plan.blocks) * 3
        assert not first < 15 < stop


def test_a_generated_video_follows_its_prompts(tmp_path: Path):
    generator = recording(JointRecache())
    prompts = [f"{OLD} | {NEW}", OTHER, f"{OLD} [9f] | {NEW}"]
    paths = generate(generator=generator, prompts=prompts, blocks=4, output_dir=str(tmp_path / "videos"))
    assert generator.count("switch") == [(6, 3), (9, 3)]  # half of twelve frames; three blocks as it says
    assert [generator.slots[0][f] for f in (0, 8)] == [NEW, NEW] and generator.slots[1][8] == OTHER
    assert 11 not in generator.slots[0]  # nobody sees the last block, so it is not encoded
    assert len(paths) == 3 and all(path.stat().st_size > 0 for path in paths)


# A window is trained under one prompt


def record_of(surrogate, exploration=None) -> Callable[[Scene], list]:
    generator = tiny_generator(policy=POLICY, clip_blocks=8)

    def probes(what: Scene) -> list:
        if exploration is None:
            plans = plans_of([what], 3, 2)
        else:
            made = exploration.plan([Scene.single(OLD)], [0], generator.recipe, Streams(0))
            plans = [replace(plan, scene=what, first_block=5) for plan in made]
            plans = [replace(plan, branches=tuple(trimmed(b) for b in plan.branches)) for plan in plans]
        tape = roll_out(generator, plans, Consistency(), surrogate.reads)
        return list(surrogate.probes(tape, generator.recipe, Streams(0)))

    return probes


def trimmed(branch):
    """The same branch routed to frames that exist before any window."""
    return branch if branch.route is None else replace(branch, route=replace(branch.route, frames=(4, 5)))


SURROGATES = [(NFT(), None, 9), (GaussianReinforce(), None, 9), (GibbsTVE(), ROUTED, 15)]


@pytest.mark.parametrize(("surrogate", "exploration", "first"), SURROGATES, ids=["nft", "gaussian", "gibbs"])
def test_a_switch_inside_a_trained_window_is_refused_and_one_at_its_start_is_not(surrogate, exploration, first):
    probes = record_of(surrogate, exploration)
    for inside in (first + 1, first + 3):
        with pytest.raises(
            ValueError, match=rf"switches at frame {first + 3}, inside the trained window {first} …"
        ) as e:
            probes(switching(inside))
        assert "NoiseEndpoint.layout" in str(e.value) and "\n" not in str(e.value)
    for outside in (first - 4, first - 1, first, first + 6):
        (found,) = probes(switching(outside))
        assert found.prompts == ((NEW if outside <= first else OLD),)


# What is judged by which prompt


def check_windows(cut: Callable, starts: list[int], start: int, frames: int, stride: int) -> None:
    """Pixel by pixel: each frame is in exactly one window, that of its own latent frame's prompt."""
    asked = scene(*((f"prompt {i}", s) for i, s in enumerate(starts)))
    recipe = GeneratorRecipe("any", 1, 1, (3, 4, 4), FewStepSchedule(), temporal_stride=stride)
    shown = [f for f in range(start, start + frames) for _ in range(1 if f == 0 else stride)]
    windows = cut(asked, start, frames, recipe)
    assert [p for w in windows for p in range(w.start, w.stop)] == list(range(len(shown)))
    for window in windows:
        assert {asked.segment_at(shown[p]).prompt for p in range(window.start, window.stop)} == {window.prompt}


SPANS = (STARTS, st.integers(0, 20), st.integers(1, 20), st.integers(1, 4))


def test_every_frame_is_judged_by_the_prompt_in_force():
    holds(lambda *drawn: check_windows(segment_windows, *drawn), *SPANS, examples=100)


def test_the_window_check_sees_pixels_counted_as_latents_and_the_first_prompt_for_all():
    def as_latents(asked: Scene, start: int, frames: int, recipe: GeneratorRecipe):
        return segment_windows(asked, start, frames, replace(recipe, temporal_stride=1))

    def first_for_all(asked: Scene, start: int, frames: int, recipe: GeneratorRecipe):
        windows = segment_windows(asked, start, frames, recipe)
        return (Window(0, windows[-1].stop, asked.prompt),)

    for wrong in (as_latents, first_for_all):
        refuted(lambda *drawn, wrong=wrong: check_windows(wrong, *drawn), *SPANS)


def test_a_decoded_tape_is_judged_per_segment_of_its_window():
    generator = tiny_generator(clip_blocks=8)
    tape = roll_out(generator, plans_of([scene((OLD, 0), (NEW, 7), (OTHER, 12)), switching(30)], 2, 3), Consistency())
    videos = decode_tape(generator, tape)
    several = (Window(0, 3, OLD), Window(3, 6, NEW), Window(6, 9, OTHER))
    assert videos.windows == (several, several, (Window(0, 9, OLD),), (Window(0, 9, OLD),))


def random_videos(seed: int, windows: tuple[tuple[Window, ...], ...]) -> VideoBatch:
    frames = torch.randint(256, (len(windows), 9, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    return VideoBatch(frames.to(torch.uint8), 8.0, windows)


def test_the_score_of_a_clip_is_the_mean_over_its_windows():
    reward, both = ShapesReward(), (Window(0, 4, OLD), Window(4, 9, NEW))
    scores = reward.score(random_videos(0, (both, (Window(0, 9, OLD),), both)))
    parts = [reward.score(random_videos(0, ((window,),) * 3)) for window in both]
    whole = reward.score(random_videos(0, ((Window(0, 9, OLD),),) * 3))
    for name in reward.signals:
        first, second = (part.values[name] for part in parts)
        close(scores.values[name][[0, 2]], ((first + second) / 2)[[0, 2]], atol=1e-6)
        assert torch.equal(scores.values[name][1], whole.values[name][1])
        close(scores.windows[name][0], torch.stack([first, second], 1)[0], atol=1e-6)
        assert scores.windows[name].shape == (3, 2) and bool(scores.windows[name][1, 1].isnan())
        assert not torch.equal(first, second)


def test_a_window_outside_the_video_is_refused():
    for window in (Window(3, 3, OLD), Window(-1, 4, OLD), Window(0, 10, OLD)):
        with pytest.raises(ValueError, match="must lie in 0 … 9"):
            random_videos(0, ((window,),))


def test_evaluating_scenes_of_different_switches_does_not_depend_on_the_batch():
    generator = generator_of(JointRecache())
    scenes = [switching(3), Scene.single(OTHER), switching(6), switching(30)]
    results = [evaluate_policy(generator, Brightness(), scenes, 2, 0, 4, clips_per_batch=n).scores for n in (2, 4, 8)]
    for other in results[1:]:
        for name, value in results[0].items():
            close(other[name], value, atol=1e-6)
    plans = evaluation_plans(scenes, 2, 0, 4)
    assert [plan.scene for plan in plans] == scenes
