"""The Gaussian surrogates on a real generator: replayed states give the rollout's own means, gradient goes where it
should, and no batching changes an update."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from framework.adapters import FullFineTuning
from framework.block_weights import FutureParticipation
from framework.interfaces import StreamingGenerator, SurrogatePolicy
from framework.kernels import Consistency, FlowGRPO, TransitionKernel
from framework.optimization import AdamW, Constant
from framework.policies import Policies
from framework.raven_advantages import RavenAdvantage
from framework.records import Endpoints, OnPolicyTransitions
from framework.rng import Streams, draw_noise
from framework.rollout import noise_shape, roll_out
from framework.types import Advantage, Loss, Probes, Tape
from strategies.exploration.noise_endpoint import NoiseEndpoint
from strategies.regularizers.kernel_kl import KernelKL
from strategies.surrogates.gaussian_kernel import GaussianRatio, GaussianRegression, GaussianReinforce, kernel_mean
from strategies.surrogates.transitions import AllSteps, EqualGradient, OneRandomStep, StepChoice, TrainedSteps
from tests.framework.test_trainer import make_trainer, timeless
from tests.support import Brightness, close, group_plans, normal, tiny_generator

KEEP = frozenset({Endpoints, OnPolicyTransitions})
KERNELS = [Consistency(), Consistency(0.4), FlowGRPO(0.7)]
ALL = TrainedSteps(history_grad=True, block_weights=FutureParticipation())


def rolled(generator: StreamingGenerator, kernel: TransitionKernel, first: int = 1, branches: int = 2) -> Tape:
    return roll_out(generator, group_plans(branches=branches, first_block=first, blocks=2), kernel, KEEP)


def probed(surrogate: SurrogatePolicy, tape: Tape, generator: StreamingGenerator, seed: int = 0) -> Probes:
    (probes,) = surrogate.probes(tape, generator.recipe, Streams(seed))
    return probes


# on-policy


def check_residual_is_the_noise(
    replay: Callable[[StreamingGenerator, Probes], Tensor], kernel: TransitionKernel
) -> None:
    """z − μ == std ε with the μ of the replay and the ε of the rollout, at every step of every block."""
    generator = tiny_generator()
    tape = rolled(generator, kernel)
    probes = probed(GaussianReinforce(), tape, generator)
    with torch.no_grad():
        mean = kernel_mean(replay(generator, probes), probes)
    seeds = [branch.noise_seed for plan in tape.plans for branch in plan.branches]
    noise = draw_noise(seeds, noise_shape(generator, kernel, 2))[:, 1:]
    std = probes.extra["std"][..., None, None, None, None]
    assert noise.shape == mean.shape
    close(probes.extra["next"] - mean, std * noise, atol=2e-5)


def honest(generator: StreamingGenerator, probes: Probes) -> Tensor:
    return generator.replay(probes)


def another_past(generator: StreamingGenerator, probes: Probes) -> Tensor:
    return generator.replay(replace(probes, clean=probes.clean.flip(0)))


def another_level(generator: StreamingGenerator, probes: Probes) -> Tensor:
    return generator.replay(replace(probes, sigma=probes.sigma.roll(1, 1)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_replayed_mean_is_the_rollouts(kernel: TransitionKernel):
    check_residual_is_the_noise(honest, kernel)


@pytest.mark.parametrize("mutant", [another_past, another_level])
def test_the_residual_check_sees_another_past_and_other_levels(mutant):
    with pytest.raises(AssertionError):
        check_residual_is_the_noise(mutant, Consistency())


# where gradient goes


def clean_gradient(history_grad: bool, block: int, kernel: TransitionKernel = KERNELS[0]) -> Tensor | None:
    """d (loss of one block) / d (clean clip) [N, C, blocks, …]; None where no graph leads there."""
    generator = tiny_generator(torch.float64)
    surrogate = GaussianReinforce(TrainedSteps(history_grad=history_grad))
    tape = roll_out(generator, group_plans(first_block=0, blocks=3), kernel, KEEP)
    probes = probed(surrogate, tape, generator)
    clean = probes.clean.double().requires_grad_()
    only = torch.zeros(len(probes), 9).index_fill_(1, torch.arange(3 * block, 3 * block + 3), 3.0)
    probes = replace(
        probes, clean=clean, noisy=probes.noisy.double(), extra=probes.extra | {"frame_weight": only.double()}
    )
    loss = surrogate.loss({"current": generator.replay(probes)}, probes, advantages(4)).per_clip.sum()
    (found,) = torch.autograd.grad(loss, clean, allow_unused=True)
    return None if found is None else found.unflatten(2, (3, 3)).abs().sum((1, 3, 4, 5))


def advantages(clips: int) -> Advantage:
    return Advantage(normal(3, clips), torch.ones(clips, dtype=torch.bool), torch.arange(clips) // 2)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_blocks_loss_reaches_the_clean_blocks_before_it_and_no_other(block: int):
    found = clean_gradient(True, block)
    reached = torch.zeros(4, 3) if found is None else found
    assert bool((reached[:, :block] > 0).all()), "the past must be reached"
    assert not reached[:, block:].any(), "neither its own twin nor the future"


@pytest.mark.parametrize("block", [0, 1, 2])
def test_detached_history_is_reached_by_no_loss_at_all(block: int):
    assert clean_gradient(False, block) is None


def encoding_gradient(surrogate: SurrogatePolicy) -> Tensor:
    """Gradient of the key weights, which encode the clean blocks and read the noisy ones."""
    generator = tiny_generator(torch.float64)
    probes = probed(surrogate, rolled(generator, Consistency()), generator)
    probes = replace(probes, noisy=probes.noisy.double(), clean=probes.clean.double())
    weight = next(p for name, p in generator.network.named_parameters() if name.endswith("attn1.to_k.weight"))
    loss = surrogate.loss({"current": generator.replay(probes)}, probes, advantages(4)).per_clip.sum()
    return torch.autograd.grad(loss, weight)[0]


def test_history_grad_changes_the_gradient_of_the_keys_and_the_two_on_policy_forms_share_it():
    attached, detached = (
        encoding_gradient(GaussianReinforce(TrainedSteps(history_grad=flag))) for flag in (True, False)
    )
    assert (attached - detached).norm() > 1e-3 * detached.norm()
    regression = encoding_gradient(GaussianRegression(TrainedSteps(history_grad=True)))
    assert (regression - attached).norm() < 1e-6 * attached.norm()  # a and b are float32, as the rollout is


# batching


def update_gradient(surrogate: SurrogatePolicy, clips: int, order: tuple[int, ...] = (0, 1), kl: float = 0.0) -> Tensor:
    """The gradient of one update of two groups of four clips, in micro-batches, all parameters joined.

    order: in which the groups stand.
    """
    generator = tiny_generator(torch.float64)
    policies = Policies(generator, FullFineTuning(), Constant(0.0), 0.9, seed=0)
    plans = group_plans(branches=4, first_block=1, blocks=2)
    tape = roll_out(generator, [plans[i] for i in order], Consistency(), KEEP)
    with torch.no_grad():
        for i, parameter in enumerate(policies.parameters.values()):
            parameter += 1e-3 * normal(i, *parameter.shape)
    policies.stepped()
    (probes,) = surrogate.probes(tape, generator.recipe, Streams(0))
    probes = replace(probes, noisy=probes.noisy.double(), clean=probes.clean.double(), prefix=probes.prefix.double())
    values = normal(9, 2, 4)[list(order)].flatten()
    whole = Advantage(values, torch.ones(8, dtype=torch.bool), tape.groups)

    def judge(statistics, rows):
        found = surrogate.objective(statistics, whole[rows])
        penalty = KernelKL(kl).penalty(found, None) if kl else 0.0
        return replace(found, per_clip=found.per_clip + penalty)

    views = surrogate.views | (KernelKL.views if kl else frozenset())
    policies.backward(Loss(views, surrogate.statistics, judge), probes, clips, total=8)
    return torch.cat([p.grad.flatten() for p in policies.parameters.values() if p.grad is not None])


SURROGATES = [
    GaussianReinforce(ALL),
    GaussianRegression(TrainedSteps(OneRandomStep(), EqualGradient(), history_grad=True)),
    GaussianRatio(TrainedSteps(OneRandomStep()), 1e-6, 1e-6),
]


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: type(s).__name__)
def test_an_update_does_not_depend_on_the_micro_batch_nor_on_the_order_of_groups(surrogate: SurrogatePolicy):
    whole = update_gradient(surrogate, 8, kl=0.1)
    assert float(whole.norm()) > 0
    for clips, order in ((1, (0, 1)), (2, (0, 1)), (4, (0, 1)), (8, (1, 0))):
        close(update_gradient(surrogate, clips, order, kl=0.1) / whole.norm(), whole / whole.norm(), atol=1e-9)


def test_the_batching_check_sees_steps_drawn_by_place():
    class ByPlace(OneRandomStep):
        def choose(self, steps, clips, streams):
            return super().choose(steps, [(0, i) for i in range(len(clips))], streams)

    surrogate = GaussianReinforce(TrainedSteps(ByPlace()))
    one, other = (update_gradient(surrogate, 8, order) for order in ((0, 1), (1, 0)))
    assert (one - other).norm() > 1e-3 * one.norm()


# in the trainer


def make(**changes):
    fields = {
        "exploration": NoiseEndpoint(4), "surrogate": GaussianReinforce(ALL), "advantage": RavenAdvantage(),
        "reward": Brightness(), "optimizer": AdamW(1e-4, eps=1e-10),
    } | changes  # fmt: skip
    return make_trainer(**fields)


def trajectory(**changes) -> list[dict[str, float]]:
    trainer = make(**changes)
    return [timeless(trainer.step()) for _ in range(2)]


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_a_training_step_is_the_same_in_any_micro_batch(micro_batch_size: int):
    whole, split = trajectory()[0], trajectory(micro_batch_size=micro_batch_size)[0]
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_the_ratio_is_one_in_the_first_update_of_a_rollout_and_not_in_the_second():
    surrogate = GaussianRatio(trained=TrainedSteps(AllSteps()))
    metrics = make(surrogate=surrogate).step()
    assert metrics["train/ratio_mean"] == 1 and metrics["train/ratio_deviation"] == 0
    second = make(surrogate=surrogate, updates_per_rollout=2, optimizer=AdamW(1e-3)).step()
    assert second["train/ratio_deviation"] > 0


@pytest.mark.parametrize(("steps", "replays"), [(AllSteps(), 3), (OneRandomStep(), 5)])
def test_the_old_policy_is_asked_again_only_where_an_update_asks_elsewhere(steps: StepChoice, replays: int):
    """Three updates ask the current policy three times and the old one, which equals it at first, never or twice."""
    trainer = make(surrogate=GaussianRatio(trained=TrainedSteps(steps)), updates_per_rollout=3)
    calls: list[int] = []
    real = trainer.generator.replay
    trainer.generator.replay = lambda probes: calls.append(1) or real(probes)
    trainer.step()
    assert len(calls) == replays


def divergences(weight: float) -> list[float]:
    """KL to the reference, step by step, where it is paid with some weight."""
    trainer = make(regularizer=KernelKL(weight), optimizer=AdamW(1e-3))
    return [float(trainer.step()["train/penalty"]) / weight for _ in range(4)]


def test_the_kl_of_the_steps_grows_from_zero_and_holds_the_policy():
    free, held = divergences(1e-9), divergences(1e3)
    assert free[0] == held[0] == 0
    assert 0 < held[-1] < free[-1]
