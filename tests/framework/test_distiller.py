"""The distillation step: who moves whom and when, where gradient flows, and which clips stand before a block."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.block_weights import FutureParticipation, Uniform
from framework.data.scenes import ShapesCaptions
from framework.data.shapes import PreferenceWorld, split_captions
from framework.distillation import (
    StudentRollout,
    matching_loss,
    noised_probes,
    predict_x0,
    roll_out_student,
    visited_probes,
)
from framework.distiller import Distiller
from framework.flow import add_noise, expand_sigma
from framework.kernels import Consistency
from framework.optimization import AdamW
from framework.rng import Streams
from framework.rollout import generate_blocks, noise_shape
from strategies.distillation.dmd import DMD
from strategies.distillation.score_levels import Floored, Rescaled
from strategies.distillation.student_history import RealClips, SelfRolled
from tests.strategies.test_distillation import same, snapshot
from tests.support import PROMPTS, close, holds, normal, over, perturb, refuted, tiny_generator

SEEDS = st.integers(0, 2**20)


def small(kind: type[Distiller] = Distiller, blocks: int = 3, **changes: Any) -> Distiller:
    """A distiller on tiny networks; the critic is already another network than the teacher."""
    critic = tiny_generator(clip_blocks=blocks)
    perturb(critic.network, 1, std=0.02)
    arguments: dict[str, Any] = {
        "generator": tiny_generator(clip_blocks=blocks),
        "teacher": tiny_generator(clip_blocks=blocks),
        "critic": critic,
        "history": SelfRolled(ShapesCaptions()),
        "gradient": DMD(),
        "levels": Floored(),
        "weights": Uniform(),
        "optimizer": AdamW(1e-3),
        "critic_optimizer": AdamW(1e-3),
        "seed": 0,
        "batch_size": 2,
        "critic_warmup": 0,
        "generator_every": 1,
        "average_decay": 0.5,
        "history_grad": True,
    } | changes
    return kind(**arguments)


# the loss


def check_loss_gradient(loss: Callable[..., Tensor], seed: int, clips: int, alpha: int) -> None:
    """dl/dx = w (f − r) / n, n = mean|x − r| of the clip, w of the block; then the mean over all elements."""
    x, f, r = (normal(seed + i, clips, 1, 2, 6, 2, 2) for i in range(3))
    per_frame = FutureParticipation(float(alpha)).per_frame([3, 3])
    weights = torch.tensor(per_frame, dtype=x.dtype).view(-1, 1, 1)
    leaf = x.clone().requires_grad_()
    loss(leaf, DMD()(x, f, r), weights).backward()
    assert leaf.grad is not None
    for n in range(clips):
        for frame, weight in enumerate(per_frame):
            by_hand = weight * (f - r)[n, :, :, frame] / (x - r)[n].abs().mean() / x.numel()
            close(leaf.grad[n, :, :, frame], by_hand, atol=1e-12)


def test_the_gradient_of_the_loss_is_the_weighted_difference_of_scores():
    holds(partial(check_loss_gradient, matching_loss), SEEDS, st.integers(1, 3), st.integers(-2, 2), examples=25)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda x, g, w: 2 * matching_loss(x, g, w),  # without the half of the papers' form
        lambda x, g, w: matching_loss(x, -g, w),
        lambda x, g, w: matching_loss(x, g, w.flip(0)),
        lambda x, g, w: (w * (x - (x - g)).square()).mean() + 0 * x.sum(),  # the target is not held
    ],
)
def test_the_loss_check_sees_another_scale_sign_block_and_a_target_that_moves(mutant):
    refuted(partial(check_loss_gradient, mutant), SEEDS, st.integers(1, 3), st.integers(1, 2))


# rollouts and questions


def history_of(clips: int, blocks: int = 3) -> Tensor:
    return PreferenceWorld().sample(clips, 3 * blocks, torch.Generator().manual_seed(5))[0]


def test_a_rollout_behind_its_own_clips_is_the_streaming_sampler():
    generator, kernel = tiny_generator(), Consistency()
    rollout = roll_out_student(generator, PROMPTS[:2], torch.Generator().manual_seed(0))
    noise = torch.randn(2, *noise_shape(generator, kernel, 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        traces = list(generate_blocks(generator, generator.open(PROMPTS[:2]), noise, kernel))
    assert torch.equal(rollout.clips, torch.cat([t.x0 for t in traces], 2)) and rollout.history is rollout.clips
    assert torch.equal(rollout.states[:, 2], torch.cat([t.states[2] for t in traces], 2))
    assert not rollout.states.requires_grad and rollout.prompts == PROMPTS[:2]


def check_states_are_answered(ask: Callable[[StudentRollout, Tensor, Sequence[float]], Any], given: bool) -> None:
    """The packed pass at the last level's states gives the clips: same states, same past, same prompts."""
    generator = tiny_generator()
    history = history_of(2) if given else None
    rollout = roll_out_student(generator, PROMPTS[:2], torch.Generator().manual_seed(0), history)
    last = torch.full((2, 1, 1), 3)
    with torch.no_grad():
        x0 = predict_x0(generator, ask(rollout, last, generator.recipe.schedule.sigmas))
    close(x0[:, 0], rollout.clips, atol=2e-5)


def visited(rollout: StudentRollout, level: Tensor, sigmas: Sequence[float]):
    return visited_probes(rollout, level, sigmas, history_grad=False)


def behind_its_own(rollout: StudentRollout, level: Tensor, sigmas: Sequence[float]):
    return visited(replace(rollout, history=rollout.clips.roll(1, 0)), level, sigmas)


def a_level_too_early(rollout: StudentRollout, level: Tensor, sigmas: Sequence[float]):
    return visited(rollout, level - 1, sigmas)


def noised_anew(rollout: StudentRollout, level: Tensor, sigmas: Sequence[float]):
    sigma = torch.tensor(sigmas)[level].expand(-1, -1, 3)
    return noised_probes(rollout, rollout.clips.unsqueeze(1), sigma, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given", [False, True])
def test_a_packed_pass_at_visited_states_repeats_the_rollout_behind_either_history(given: bool):
    check_states_are_answered(visited, given)


@pytest.mark.parametrize("mutant", [behind_its_own, a_level_too_early, noised_anew])
@pytest.mark.parametrize("given", [False, True])
def test_the_state_check_sees_other_histories_levels_and_states(mutant, given: bool):
    with pytest.raises(AssertionError):
        check_states_are_answered(mutant, given)


def test_real_clips_before_a_block_change_all_blocks_but_the_first():
    generator = tiny_generator()
    own, real = (
        roll_out_student(generator, PROMPTS[:2], torch.Generator().manual_seed(0), h) for h in (None, history_of(2))
    )
    assert torch.equal(own.clips[:, :, :3], real.clips[:, :, :3])
    for block in (1, 2):
        part = slice(3 * block, 3 * block + 3)
        assert not torch.equal(own.clips[:, :, part], real.clips[:, :, part])
    assert torch.equal(real.history, history_of(2))


@over(SEEDS, st.integers(1, 3), examples=10)
def test_every_block_can_have_a_level_of_its_own(seed: int, clips: int):
    states, x = normal(seed, clips, 4, 2, 6, 2, 2), normal(seed + 1, clips, 2, 6, 2, 2)
    level = torch.randint(4, (clips, 1, 2), generator=torch.Generator().manual_seed(seed))
    probes = visited_probes(StudentRollout(PROMPTS[:clips], states, x, x), level, (1.0, 0.9, 0.8, 0.6), True)
    for n in range(clips):
        for block in range(2):
            part, k = slice(3 * block, 3 * block + 3), int(level[n, 0, block])
            assert torch.equal(probes.noisy[n, 0, :, part], states[n, k, :, part])
            assert bool((probes.sigma[n, 0, part] == torch.tensor((1.0, 0.9, 0.8, 0.6))[k]).all())
    assert probes.history_grad and probes.clean is x


def test_every_level_is_visited_the_first_and_the_last_included(monkeypatch: pytest.MonkeyPatch):
    distiller = small()
    asked: set[float] = set()
    replay = distiller.generator.replay
    monkeypatch.setattr(
        distiller.generator, "replay", lambda p: (asked.update(p.sigma.unique().tolist()), replay(p))[1]
    )
    rollout = roll_out_student(distiller.generator, PROMPTS[:2], torch.Generator().manual_seed(0))
    for step in range(12):
        distiller.move_student(rollout, Streams(step))
    assert sorted(asked) == pytest.approx(sorted(distiller.generator.recipe.schedule.sigmas))


# who learns what, and when


def check_separation(kind: type[Distiller]) -> None:
    """The critic's phase moves the critic alone, the student's phase the student alone, nothing moves the teacher."""
    distiller = small(kind)
    streams = Streams(0)
    rollout = roll_out_student(distiller.generator, PROMPTS[:2], streams("rollout"))
    networks = {"student": distiller.generator, "critic": distiller.critic, "teacher": distiller.teacher}
    for phase, moved in ((distiller.teach_critic, "critic"), (distiller.move_student, "student")):
        before = {name: snapshot(g.network) for name, g in networks.items()}
        phase(rollout, streams)
        for name, generator in networks.items():
            assert same(snapshot(generator.network), before[name]) == (name != moved), (phase, name)
            assert all(p.grad is None for p in generator.network.parameters()), name


class StudentThroughTheCritic(Distiller):
    """A planted error: the critic's loss is asked of clips that carry the student's graph."""

    def teach_critic(self, rollout, streams):
        k = torch.zeros(len(rollout.clips), 1, 1, dtype=torch.long)
        x0 = predict_x0(self.generator, visited_probes(rollout, k, self.generator.recipe.schedule.sigmas, False))
        return super().teach_critic(replace(rollout, clips=x0[:, 0]), streams)


class LearningTeacher(Distiller):
    """A planted error: the critic's optimiser has the teacher's parameters."""

    def __post_init__(self):
        super().__post_init__()
        self.teacher.network.requires_grad_(True)
        self.critic = self.teacher
        self.critic_parameters = dict(self.teacher.network.named_parameters())
        self.torch_critic_optimizer = self.critic_optimizer.build(self.critic_parameters.values())


def test_each_phase_moves_its_own_network_and_leaves_no_gradient_behind():
    check_separation(Distiller)


@pytest.mark.parametrize("mutant", [StudentThroughTheCritic, LearningTeacher])
def test_the_separation_check_sees_gradient_that_leaks_and_a_teacher_that_learns(mutant):
    with pytest.raises(AssertionError):
        check_separation(mutant)


def test_the_critic_has_learnt_before_the_student_is_moved(monkeypatch: pytest.MonkeyPatch):
    distiller = small()
    order: list[str] = []
    for name in ("teach_critic", "move_student"):
        phase = getattr(distiller, name)
        monkeypatch.setattr(distiller, name, lambda *a, n=name, f=phase: (order.append(n), f(*a))[1])
    distiller.step()
    assert order == ["teach_critic", "move_student"]


def check_counts(kind: type[Distiller], warmup: int, every: int, steps: int) -> None:
    """After the warm-up the student moves on the last of every ``every`` critic updates; the average with it."""
    distiller = kind(**vars_of(small(blocks=1, critic_warmup=warmup, generator_every=every)))
    moved, averaged = [], []
    for step in range(steps):
        student, average = snapshot(distiller.generator.network), dict_of(distiller)
        critic = snapshot(distiller.critic.network)
        distiller.step()
        assert not same(snapshot(distiller.critic.network), critic)
        if not same(snapshot(distiller.generator.network), student):
            moved.append(step)
        if not same(dict_of(distiller), average):
            averaged.append(step)
    expected = [step for step in range(steps) if step >= warmup and (step + 1 - warmup) % every == 0]
    assert moved == averaged == expected and distiller.updates_done == len(expected)


def vars_of(distiller: Distiller) -> dict[str, Any]:
    return {name: getattr(distiller, name) for name in Distiller.__dataclass_fields__}


def dict_of(distiller: Distiller) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in distiller.average.weights.items()}


class EveryStep(Distiller):
    """A planted error: the ratio is not kept."""

    def student_is_due(self):
        return self.steps_done >= self.critic_warmup


class NoWarmup(Distiller):
    """A planted error: the student does not wait."""

    def student_is_due(self):
        return (self.steps_done + 1) % self.generator_every == 0


@pytest.mark.parametrize(("warmup", "every"), [(0, 1), (0, 2), (3, 1), (1, 3)])
def test_the_student_is_moved_as_often_as_the_ratio_says(warmup: int, every: int):
    check_counts(Distiller, warmup, every, 7)


@pytest.mark.parametrize("mutant", [EveryStep, NoWarmup])
def test_the_count_check_sees_a_student_that_moves_too_often(mutant):
    with pytest.raises(AssertionError):
        check_counts(mutant, 1, 3, 7)


def test_a_critic_that_agrees_with_the_teacher_moves_the_student_nowhere():
    frozen = AdamW(learning_rate=1e-30, weight_decay=0.0)
    distiller = small(critic=tiny_generator(), critic_optimizer=frozen, optimizer=AdamW(1e-3, weight_decay=0.0))
    start = snapshot(distiller.generator.network)
    assert distiller.step()["train/gradient_rms"] == 0 and same(snapshot(distiller.generator.network), start)


# the switches


def gradient_through_history(history_grad: bool, blocks: int = 3) -> Tensor:
    """Gradient of the last block's x̂0 with respect to the clean block before it, by way of the replayed pass."""
    generator = tiny_generator(clip_blocks=blocks)
    rollout = roll_out_student(generator, PROMPTS[:2], torch.Generator().manual_seed(0))
    history = rollout.history.clone().requires_grad_()
    probes = visited_probes(
        replace(rollout, history=history), torch.full((2, 1, 1), 1), generator.recipe.schedule.sigmas, history_grad
    )
    predict_x0(generator, probes)[:, :, :, -3:].sum().backward()
    return torch.zeros_like(history) if history.grad is None else history.grad


def test_gradient_reaches_the_encoding_of_the_past_exactly_when_history_is_attached():
    attached, detached = gradient_through_history(True), gradient_through_history(False)
    assert torch.equal(detached, torch.zeros_like(detached))
    assert all(bool(attached[:, :, 3 * b : 3 * b + 3].abs().sum() > 0) for b in (0, 1))
    assert torch.equal(attached[:, :, 6:], torch.zeros_like(attached[:, :, 6:])), "nobody sees the last clean block"


SWITCHES: dict[str, dict[str, Any]] = {
    "detached history": {"history_grad": False},
    "late blocks": {"weights": FutureParticipation(-1.0)},
    "early blocks": {"weights": FutureParticipation(1.0)},
    "real clips": {"history": RealClips(PreferenceWorld())},
    "other levels": {"levels": Rescaled()},
    "update ratio": {"generator_every": 2},
    "another seed": {"seed": 1},
}


def after_steps(steps: int = 2, **changes: Any) -> dict[str, Tensor]:
    distiller = small(**changes)
    for _ in range(steps):
        distiller.step()
    return snapshot(distiller.generator.network)


@pytest.mark.parametrize("change", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_changes_what_is_learnt_and_the_same_switch_does_not(change: dict[str, Any]):
    assert same(after_steps(**change), after_steps(**change))
    assert not same(after_steps(**change), after_steps())


def test_uniform_weights_are_alpha_zero():
    assert same(after_steps(), after_steps(weights=FutureParticipation(0.0)))


def test_detached_history_leaves_the_first_block_as_it_is():
    one = small(blocks=1), small(blocks=1, history_grad=False)
    for distiller in one:
        distiller.step()
    assert same(snapshot(one[0].generator.network), snapshot(one[1].generator.network))


# histories and levels


def test_prompts_are_drawn_epoch_by_epoch_and_no_held_out_caption_is_among_them():
    held_out = {str(caption) for caption in split_captions()[1]}
    history, recipe = SelfRolled(ShapesCaptions()), tiny_generator().recipe
    seen = [history.draw(40, step, recipe, Streams(3).at("distill", step)) for step in range(3)]
    prompts = [prompt for drawn, past in seen for prompt in drawn]
    assert all(past is None for _, past in seen)
    assert sorted(prompts) == sorted(scene.prompt for scene in ShapesCaptions().scenes())
    assert not set(prompts) & held_out


def test_real_clips_come_with_their_captions_and_can_leave_out_the_same_ones():
    recipe = tiny_generator().recipe
    drawn, clips = RealClips(PreferenceWorld(held_out_count=24)).draw(200, 0, recipe, Streams(0).at("distill", 0))
    assert clips is not None and clips.shape == (200, 3, 9, 16, 16)
    assert set(drawn) <= {scene.prompt for scene in ShapesCaptions().scenes()}
    everything, _ = RealClips(PreferenceWorld()).draw(200, 0, recipe, Streams(0).at("distill", 0))
    assert not set(everything) <= {scene.prompt for scene in ShapesCaptions().scenes()}


def check_levels(draw: Callable[[int, int, float, torch.Generator], Tensor], low: float, high: float) -> None:
    sigma = draw(2000, 3, 5.0, torch.Generator().manual_seed(0))
    assert sigma.shape == (2000, 1, 3) and low <= float(sigma.min()) and float(sigma.max()) <= high
    u = (torch.arange(6000) + 0.5) / 6000  # the mean of the shifted law, by quadrature
    mean = low + (high - low) * float((5 * u / (1 + 4 * u)).mean())
    assert float(sigma.mean()) == pytest.approx(mean, abs=0.015)
    assert len(sigma.unique()) > 5990, "levels pile up"


def test_rescaled_levels_fill_their_interval_and_pile_up_nowhere():
    check_levels(Rescaled().draw, 0.02, 0.98)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda *a: Floored(0.02).draw(*a).clamp(max=0.98),  # cut instead of rescaled
        lambda n, b, s, g: Rescaled().draw(n, b, 1.0, g),  # not shifted
        Rescaled(per_block=False).draw,  # one level for all blocks
    ],
)
def test_the_level_check_sees_clamped_and_unshifted_levels(mutant):
    with pytest.raises(AssertionError):
        check_levels(mutant, 0.02, 0.98)


def test_levels_can_be_shared_by_a_clip_and_rounded_to_timesteps():
    sigma = Rescaled(per_block=False, integer_timesteps=True).draw(50, 3, 5.0, torch.Generator().manual_seed(0))
    assert bool((sigma == sigma[..., :1]).all()) and len(sigma.unique()) > 30
    close(1000 * sigma, (1000 * sigma).round(), atol=1e-3)


def test_questions_are_noised_to_their_level_behind_the_rollouts_history():
    x, past = normal(0, 2, 1, 2, 6, 2, 2), normal(1, 2, 2, 6, 2, 2)
    rollout = StudentRollout(PROMPTS[:2], x, x[:, 0], past)
    sigma = torch.tensor([[[0.3, 0.9]], [[0.5, 0.1]]], dtype=torch.float64)
    probes = noised_probes(rollout, x, sigma, torch.Generator().manual_seed(0))
    wide = expand_sigma(sigma.repeat_interleave(3, -1))
    close(probes.noisy, add_noise(x, probes.extra["target"] + x, wide), atol=1e-7)
    assert probes.clean is past and not probes.history_grad and probes.prompts == PROMPTS[:2]


# what is refused


def test_networks_that_share_weights_or_clips_of_other_shapes_are_refused():
    one = tiny_generator()
    with pytest.raises(ValueError, match=r"distill\.generator and distill\.critic share weights"):
        small(generator=one, critic=one)
    with pytest.raises(ValueError, match=r"distill\.generator and distill\.teacher work on other clips"):
        small(teacher=tiny_generator(clip_blocks=2))


class Broken:
    """Clips that cannot be used."""

    def sample(self, n: int, frames: int, generator: torch.Generator) -> tuple[Tensor, list]:
        return torch.full((n, 3, frames, 16, 16), torch.nan), list(PROMPTS[:n])


def test_clips_and_levels_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match=r"RealClips\.data=Broken gave a clip that is not finite"):
        small(history=RealClips(Broken())).step()
    with pytest.raises(ValueError, match=r"Floored\.floor must lie in"):
        Floored(1.0)
    for low, high in ((0.0, 0.9), (0.5, 0.5), (0.1, 1.0)):
        with pytest.raises(ValueError, match="Rescaled needs 0 < low < high < 1"):
            Rescaled(low, high)


def test_the_averaged_weights_stand_in_and_go_again():
    distiller = small()
    for _ in range(2):
        distiller.step()
    current, average = snapshot(distiller.generator.network), dict_of(distiller)
    with pytest.raises(RuntimeError, match="inside"), distiller.averaged():
        assert same(snapshot(distiller.generator.network), {name: average[name] for name in current})
        raise RuntimeError("inside")
    assert same(snapshot(distiller.generator.network), current) and not same(current, average)
