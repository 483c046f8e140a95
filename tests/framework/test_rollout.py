"""A rollout shares what branches share, keeps what somebody reads, and replays to what it was."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from backbones.embedded.generator import ShapesGenerator
from backbones.history import FullHistory, HistoryPolicy, SinkWindow
from framework.evaluation import decode_tape
from framework.kernels import Consistency, Ode, TransitionKernel
from framework.records import Endpoints, OnPolicyTransitions, Predictions, Record, Transitions
from framework.rng import derive_seed, draw_noise
from framework.rollout import denoise_block, generate_blocks, noise_count, noise_shape, roll_out
from framework.selfchecks import check_replay, replay_deviation, replay_probes
from framework.types import BranchPlan, GroupPlan, Probes, Tape
from tests.support import PROMPTS, close, group_plans, holds, over, refuted, tiny_generator

POLICIES: dict[str, HistoryPolicy] = {
    "everything": FullHistory(),
    "evicting": SinkWindow(sink=2, window=6),
    "relative": SinkWindow(sink=3, window=7, relative=True),
}
ALL = frozenset({Endpoints, Predictions, Transitions})


class Counted(ShapesGenerator):
    """The generator with a tally of rows that went through the network, by kind of call."""

    tally: Counter[str]

    def predict(self, x, sigma, stream, visible=None):
        self.tally["predict"] += len(x)
        return super().predict(x, sigma, stream, visible)

    def commit(self, x0, stream, visible=None):
        self.tally["commit"] += len(x0)
        return super().commit(x0, stream, visible)


def counted(policy: HistoryPolicy | None = None) -> Counted:
    plain = tiny_generator(policy=policy)
    generator = Counted(plain.network, plain.policy)
    generator.recipe, generator.tally = plain.recipe, Counter()
    return generator


# how much work


RollOut = Callable[..., Tape]


def check_work(rolled: RollOut, groups: int, branches: int, prefix: int, blocks: int) -> None:
    """P prefixes and P·B windows: K calls a block, one commit a block but the last, which nobody sees."""
    generator = counted()
    rolled(generator, group_plans(PROMPTS[:groups], branches, prefix, blocks), Consistency())
    clips, steps = groups * branches, len(generator.recipe.schedule.sigmas)
    assert generator.tally["predict"] == steps * (groups * prefix + clips * blocks)
    assert generator.tally["commit"] == groups * prefix + clips * (blocks - 1)


def branch_by_branch(generator: ShapesGenerator, plans: Sequence[GroupPlan], kernel: TransitionKernel) -> Tape:
    """A planted error of cost: every branch generates the prefix of its group again."""
    for plan in plans:
        for branch in plan.branches:
            roll_out(generator, [replace(plan, branches=(branch,))], kernel)
    return Tape(tuple(plans), {})


SIZES = (st.integers(1, 2), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))


def test_the_shared_prefix_is_generated_once_a_group():
    holds(partial(check_work, roll_out), *SIZES, examples=12)


def test_the_work_check_sees_a_prefix_for_every_branch():
    refuted(partial(check_work, branch_by_branch), *SIZES, examples=40)


# branches


def check_equal_seeds_are_equal_clips(tape: Tape) -> None:
    """Clips of a group are bit-identical where their seeds are equal, and different where they are not."""
    latents = tape[Endpoints].latents
    first = 0
    for plan in tape.plans:
        seeds = [branch.noise_seed for branch in plan.branches]
        for i in range(len(seeds)):
            for j in range(i):
                assert torch.equal(latents[first + i], latents[first + j]) == (seeds[i] == seeds[j])
        first += len(seeds)


def rolled_with(seeds: list[int], prefix: int) -> Tape:
    """One group; weights in float64, whose rounding does not depend on a clip's place in a batch product."""
    (plan,) = group_plans(PROMPTS[:1], 1, prefix, 2)
    plan = replace(plan, branches=tuple(BranchPlan(seed) for seed in seeds))
    return roll_out(tiny_generator(torch.float64), [plan], Consistency())


@over(st.lists(st.integers(0, 3), min_size=2, max_size=5), st.integers(0, 1), examples=12)
def test_branches_of_equal_seeds_are_bit_identical(seeds: list[int], prefix: int):
    check_equal_seeds_are_equal_clips(rolled_with(seeds, prefix))


def test_the_branch_check_sees_noise_that_ignores_the_seeds(monkeypatch):
    def one_stream(seeds, shape, device="cpu"):
        return torch.randn(len(seeds), *shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr("framework.rollout.draw_noise", one_stream)
    with pytest.raises(AssertionError):
        check_equal_seeds_are_equal_clips(rolled_with([1, 1], 0))


def unforked(generator: ShapesGenerator, plan: GroupPlan, kernel: TransitionKernel) -> Tensor:
    """One stream from frame 0 with the noise of the prefix and of the first branch, no fork anywhere."""
    before = [derive_seed(plan.prefix_seed, "block", block) for block in range(plan.first_block)]
    parts = [
        *(draw_noise([seed], noise_shape(generator, kernel, 1)) for seed in before),
        draw_noise([plan.branches[0].noise_seed], noise_shape(generator, kernel, plan.blocks)),
    ]
    with torch.no_grad():
        stream = generator.open([plan.scene.prompt])
        traces = list(generate_blocks(generator, stream, torch.cat(parts, dim=3), kernel))
    return torch.cat([trace.x0 for trace in traces], dim=2)


def check_fork_is_free(policy: HistoryPolicy, branches: int, prefix: int, kernel: TransitionKernel) -> None:
    """Forking changes nothing: prefix and window are one un-forked rollout, bit for bit."""
    generator = tiny_generator(policy=policy)
    (plan,) = group_plans(PROMPTS[:1], 1, prefix, 2)
    plan = replace(plan, branches=plan.branches * branches)
    ends = roll_out(generator, [plan], kernel)[Endpoints]
    whole = unforked(generator, plan, kernel)
    assert ends.start == 3 * prefix and ends.prefix is not None
    assert torch.equal(ends.prefix, whole[:, :, : ends.start])
    for clip in ends.latents:
        if branches == 1:
            assert torch.equal(clip, whole[0, :, ends.start :])
        else:  # matrix products of another batch size round differently
            close(clip, whole[0, :, ends.start :], atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("kernel", [Consistency(), Consistency(0.5), Ode()])
def test_a_branch_of_the_unforked_noise_is_the_unforked_rollout(policy: HistoryPolicy, kernel: TransitionKernel):
    for branches in (1, 3):
        check_fork_is_free(policy, branches, 2, kernel)


def test_the_fork_check_sees_a_prefix_that_is_lost(monkeypatch):
    def forgetting(self, stream, branches):
        return replace(self.open(PROMPTS[:1] * branches), history=stream.history.fork(branches).__class__())

    monkeypatch.setattr(ShapesGenerator, "fork", forgetting)
    with pytest.raises(AssertionError):
        check_fork_is_free(FullHistory(), 3, 2, Consistency())


def test_windows_of_one_rollout_must_agree():
    long, short = group_plans(PROMPTS[:1], 2, 1, 2), group_plans(PROMPTS[1:2], 2, 0, 3)
    with pytest.raises(ValueError, match="share their window and their group size"):
        roll_out(tiny_generator(), [*long, *short], Consistency())


# records


KEEPS = st.frozensets(st.sampled_from([Endpoints, Predictions, Transitions, OnPolicyTransitions]))


def check_keeps(rolled: RollOut, keep: frozenset[type[Record]]) -> None:
    """What was asked for is there, what was not is not; end points are always there."""
    tape = rolled(tiny_generator(), group_plans(PROMPTS[:1], 2, blocks=1), Consistency(), keep)
    wanted = {OnPolicyTransitions if issubclass(kind, Transitions) else kind for kind in keep}
    assert set(tape.records) == wanted | {Endpoints}
    for kind in keep:
        assert isinstance(tape[kind], kind)


def keeping_all(generator, plans, kernel, keep) -> Tape:
    return roll_out(generator, plans, kernel, ALL)


def test_records_are_kept_only_when_asked_for():
    holds(partial(check_keeps, roll_out), KEEPS, examples=16)


def test_the_keep_check_sees_a_tape_that_keeps_everything():
    refuted(partial(check_keeps, keeping_all), KEEPS)


def test_a_record_that_was_not_kept_is_named():
    tape = roll_out(tiny_generator(), group_plans(PROMPTS[:1], 2, blocks=1), Consistency())
    with pytest.raises(KeyError, match=r"kept no Transitions; it kept \['Endpoints'\]"):
        tape[Transitions]


def check_path(tape: Tape, kernel: TransitionKernel) -> None:
    """States, velocities and next states are one path: each step is the kernel's, the last one ends in the clip."""
    seen, steps, ends = tape[Predictions], tape[Transitions], tape[Endpoints]
    assert seen.sigmas == tuple(sigma for sigma, _ in steps.grid)
    assert torch.equal(seen.states, steps.states)
    assert torch.equal(steps.next_states[:, :-1], steps.states[:, 1:])
    assert torch.equal(steps.next_states[:, -1], ends.latents)
    for k, (sigma, sigma_next) in enumerate(steps.grid):
        mean = kernel.mean(steps.states[:, k], seen.velocities[:, k], sigma, sigma_next)
        drawn = steps.next_states[:, k] - mean
        std = kernel.std(sigma, sigma_next)
        close(drawn.square().mean().sqrt(), torch.tensor(std), atol=0.05 * std + 1e-6)  # 13 824 numbers: 0.6 % error


@pytest.mark.parametrize("kernel", [Consistency(), Consistency(0.5)])
def test_the_recorded_steps_are_the_kernels(kernel: TransitionKernel):
    tape = roll_out(tiny_generator(), group_plans(PROMPTS[:2], 2, 1, 2), kernel, ALL)
    check_path(tape, kernel)
    with pytest.raises(AssertionError):
        check_path(tape, Consistency(0.8))
    swapped = tape[Predictions]
    broken = replace(swapped, velocities=swapped.velocities.flip(1))
    with pytest.raises(AssertionError):
        check_path(Tape(tape.plans, dict(tape.records) | {Predictions: broken}), kernel)


def test_a_tape_is_made_without_a_graph_and_decodes_to_the_window_alone():
    generator = tiny_generator()
    tape = roll_out(generator, group_plans(PROMPTS[:2], 3, 1, 2), Consistency(), ALL)
    assert not tape[Endpoints].latents.requires_grad and not tape[Predictions].velocities.requires_grad
    videos = decode_tape(generator, tape)
    assert videos.frames.shape == (6, 6, 3, 16, 16) and videos.fps == 8.0
    assert videos.prompts == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    expected = ((tape[Endpoints].latents.transpose(1, 2).clamp(-1, 1) + 1) * 127.5).round()
    assert torch.equal(videos.frames.float(), expected)


def test_a_block_asks_the_network_at_the_grid_and_leaves_its_stream_alone():
    generator = counted()
    asked: list[float] = []
    real = generator.predict
    generator.predict = lambda x, sigma, stream, visible=None: asked.append(sigma) or real(x, sigma, stream)  # type: ignore
    with torch.no_grad():
        stream = generator.open(PROMPTS[:1])
        noise = draw_noise([0], (noise_count(Consistency(), generator.recipe), 3, 3, 16, 16))
        trace = denoise_block(generator, stream, noise, Consistency())
    assert tuple(asked) == generator.recipe.schedule.sigmas and stream.next_frame == 0
    assert torch.equal(trace.states[0], noise[:, 0]) and len(trace.states) == len(trace.velocities) + 1 == 5
    assert noise_count(Ode(), generator.recipe) == 1 and noise_count(Consistency(), generator.recipe) == 4


# replay


class Blurry(ShapesGenerator):
    """A planted error: the update replays under another history than the rollout had."""

    def replay(self, probes: Probes) -> Tensor:
        twin = ShapesGenerator(self.network, SinkWindow(sink=0, window=3))
        twin.recipe = self.recipe
        return twin.replay(probes)


class NoisyContext(ShapesGenerator):
    """A planted error: the update sees a context that the rollout never committed."""

    def replay(self, probes: Probes) -> Tensor:
        return super().replay(replace(probes, clean=probes.noisy[:, 0]))


class StaleText(ShapesGenerator):
    """A planted error: the update reads the text of other prompts."""

    def replay(self, probes: Probes) -> Tensor:
        return super().replay(replace(probes, scenes=probes.scenes[::-1]))


def rolled(kind: type[ShapesGenerator], policy: HistoryPolicy, prefix: int) -> tuple[ShapesGenerator, Tape]:
    plain = tiny_generator(policy=policy)
    generator = kind(plain.network, policy)
    generator.recipe = plain.recipe
    plans = group_plans((PROMPTS[0], PROMPTS[5]), 2, prefix, 3)
    return generator, roll_out(generator, plans, Consistency(), frozenset({Predictions}))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_a_stored_rollout_replays_to_its_own_velocities(policy: HistoryPolicy, prefix: int):
    generator, tape = rolled(ShapesGenerator, policy, prefix)
    assert replay_deviation(generator, tape) < 1e-5
    assert "relative deviation" in check_replay(generator, tape, 1e-5)


class Narrow(ShapesGenerator):
    """A generator with room for two clips in an update."""

    def replay(self, probes: Probes) -> Tensor:
        assert len(probes) <= 2
        return super().replay(probes)


def test_the_replay_of_a_rollout_needs_no_more_room_than_an_update():
    generator, tape = rolled(Narrow, FullHistory(), 1)
    assert replay_deviation(generator, tape, clips=2) < 1e-5
    assert replay_deviation(generator, tape, clips=3) < 1e-5  # whole groups of two
    with pytest.raises(AssertionError):
        replay_deviation(generator, tape)
    tape[Predictions].velocities[3] *= 1.1
    assert replay_deviation(generator, tape, clips=2) > 1e-3  # the last part counts too


def test_a_micro_batch_that_divides_groups_without_their_anchor_is_no_obstacle_to_the_replay():
    generator = tiny_generator()
    tape = roll_out(generator, group_plans(PROMPTS[:2], 3, 0, 2), Consistency(), frozenset({Predictions}))
    assert replay_deviation(generator, tape, clips=2) < 1e-5


@pytest.mark.parametrize("kind", [Blurry, NoisyContext, StaleText])
def test_a_replay_of_another_policy_stops_the_run(kind: type[ShapesGenerator]):
    generator, tape = rolled(kind, FullHistory(), 1)
    with pytest.raises(ValueError, match="rollout and update would train different policies"):
        check_replay(generator, tape, 1e-3)


def test_a_replay_that_is_not_a_number_stops_the_run():
    generator, tape = rolled(ShapesGenerator, FullHistory(), 0)
    with torch.no_grad():
        generator.network.proj_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError):
        check_replay(generator, tape, 1e-3)


def test_weights_that_moved_since_the_rollout_show_in_the_deviation():
    generator, tape = rolled(ShapesGenerator, FullHistory(), 0)
    with torch.no_grad():
        generator.network.blocks[1].ffn.net[2].weight.mul_(1.1)
    assert replay_deviation(generator, tape) > 1e-3


def test_replay_asks_all_visited_states_as_streams_of_one_clip():
    generator, tape = rolled(ShapesGenerator, FullHistory(), 1)
    probes = replay_probes(tape)
    assert probes.noisy.shape[1] == 4 and probes.start == 3 and probes.prefix is not None
    close(probes.sigma[0, :, 0], torch.tensor(generator.recipe.schedule.sigmas), atol=1e-7)
