"""Kind l5: CM-GRPO on the consistency kernel: grids, block weights, one step per clip, regression loss and KL."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from framework.advantages import clip_symmetric
from framework.block_weights import BlockWeights, FutureParticipation, Uniform
from framework.flow import x0_from_velocity
from framework.interfaces import GeneratorRecipe, SurrogatePolicy
from framework.kernels import Consistency, gaussian_log_density
from framework.records import Endpoints, OnPolicyTransitions
from framework.rng import Streams
from framework.schedules import FewStepSchedule
from framework.types import Advantage, BranchPlan, GroupPlan, Objective, Probes, Scene, Tape
from strategies.regularizers.kernel_kl import KernelKL
from strategies.surrogates.gaussian_kernel import (
    GaussianRegression,
    GaussianReinforce,
    kernel_divergence,
    score_pull,
    x0_regression,
)
from strategies.surrogates.transitions import PlainSteps, ReleasedReweight, StepChoice, StepWeights, TrainedSteps
from tests.golden.backbone import precision
from tests.golden.case import Case, Row, compare, largest_difference

INPUTS: tuple[str, ...] = ("x_t", "velocity", "velocity_ref", "next_x", "step_index", "advantages")
NOT_TAKEN_UP: tuple[str, ...] = ()
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Relative to the largest expected entry."""
WEIGHT_TOLERANCE = 1e-6
FORMS: dict[str, StepWeights] = {"plain": PlainSteps(), "reweighted": ReleasedReweight()}
KERNEL = Consistency()


def check(case: Case) -> list[Row]:
    """Grids and weights in float64, the loss in both precisions."""
    rows = [compare(case, name, grid, 1e-9, "float64") for name, grid in grids(case)]
    rows += [compare(case, name, weights, WEIGHT_TOLERANCE, "float64") for name, weights in block_weights(case)]
    for dtype, tolerance in TOLERANCE.items():
        clips = Clips.read(case, dtype)
        computed = [*kernel_quantities(clips), *losses(case, clips)]
        rows += [compare(case, *pair, tolerance, precision(dtype), relative_difference) for pair in computed]
    return rows


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|, and infinite where only one of them is NaN (a step has no density)."""
    absent = expected.isnan()
    if not torch.equal(actual.isnan(), absent):
        return float("inf")
    if bool(absent.all()):
        return 0.0
    return largest_difference(actual[~absent], expected[~absent]) / (float(expected[~absent].abs().max()) or 1.0)


# Grids and weights


def grids(case: Case) -> Iterator[tuple[str, Tensor]]:
    """schedule.K…_shift….*: the trailing grid u = 1, 1 − 1/K, …, in whole timesteps."""
    for name in case.tensors:
        found = re.fullmatch(r"schedule\.K(\d+)_shift([\d.]+)\.(timesteps|alpha_next|sigma_next)", name)
        if found is None:
            continue
        count, shift, asked = int(found[1]), float(found[2]), found[3]
        steps = tuple(1000 * (count - i) / count for i in range(count))
        transitions = FewStepSchedule(steps, shift, integer_timesteps=True).transitions
        now, following = torch.tensor(transitions, dtype=torch.float64).unbind(1)
        yield name, {"timesteps": 1000 * now, "alpha_next": 1 - following, "sigma_next": following}[asked]


def block_weights(case: Case) -> Iterator[tuple[str, Tensor]]:
    """chunk_weights.ALPHA of the case's blocks and chunk_weights_table.LAYOUT.ALPHA."""
    for name in case.tensors:
        found = re.fullmatch(r"chunk_weights(?:_table\.(\w+))?\.(-?\d+(?:\.\d+)?)", name)
        if found is not None:
            frames = case.hparam("chunk_frames") if found[1] is None else layout(found[1])
            yield name, torch.tensor(FutureParticipation(float(found[2]))(frames), dtype=torch.float64)


def layout(name: str) -> list[int]:
    """Frames of each block: equalT is T equal ones, firstA_thenBxT a block of A and T of B."""
    if found := re.fullmatch(r"equal(\d+)", name):
        return [1] * int(found[1])
    if found := re.fullmatch(r"first(\d+)_then(\d+)x(\d+)", name):
        first, then, times = (int(n) for n in found.groups())
        return [first, *[then] * times]
    raise ValueError(f"{name!r} is no block layout; 'equal7' and 'first1_then3x4' are")


# One step per clip


@dataclass(frozen=True)
class Given(StepChoice):
    """The steps that the case names, one per clip."""

    steps: Tensor

    @property
    def fixed(self) -> bool:
        return True

    def choose(self, steps: int, clips: Sequence[tuple[int, int]], streams: Streams) -> Tensor:
        return self.steps[:, None]


@dataclass(frozen=True)
class Clips:
    """Every clip's one step. trained: which clips took a step with a density, bool [N]; the others have no loss."""

    x: Tensor  # [N, C, F, H, W]
    velocity: Tensor
    reference: Tensor
    following: Tensor
    step: Tensor  # [N]
    advantage: Tensor  # [N], clipped
    trained: Tensor  # [N]
    grid: tuple[tuple[float, float], ...]
    block_frames: tuple[int, ...]

    @classmethod
    def read(cls, case: Case, dtype: torch.dtype) -> "Clips":
        x, velocity, reference, following = (
            case[name].to(dtype) for name in ("x_t", "velocity", "velocity_ref", "next_x")
        )
        levels = [step / 1000 for step in case.hparam("grid")]
        advantage = clip_symmetric(case["advantages"].to(dtype), case.hparam("adv_clip_max"))
        trained = case["step_index"] < case.hparam("trained_steps")
        pairs = tuple(pairwise(levels))
        frames = tuple(case.hparam("chunk_frames"))
        return cls(x, velocity, reference, following, case["step_index"], advantage, trained, pairs, frames)

    def of_step(self, value) -> Tensor:
        """A number of each clip's step [N]."""
        return torch.tensor([value(*self.grid[k]) for k in self.step.tolist()], dtype=self.x.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """[n, …] of the trained clips → [N, …], 0 elsewhere."""
        return values.new_zeros(len(self.x), *values.shape[1:]).index_put((self.trained,), values)

    @property
    def tape(self) -> Tape:
        """The trained clips as a rollout that visited one state each."""
        rows = torch.nonzero(self.trained).squeeze(1)
        states = self.x.new_zeros(len(rows), len(self.grid), *self.x.shape[1:])
        following = states.clone()
        for n, row in enumerate(rows.tolist()):
            states[n, self.step[row]], following[n, self.step[row]] = self.x[row], self.following[row]
        branches = tuple(BranchPlan(seed) for seed in range(len(rows)))
        plan = GroupPlan(0, Scene.single("one prompt"), 0, len(self.block_frames), 0, branches)
        record = OnPolicyTransitions(states, following, self.grid, KERNEL)
        return Tape((plan,), {OnPolicyTransitions: record, Endpoints: Endpoints(self.x[rows], None, 0)})

    def probes(self, surrogate: SurrogatePolicy, weights: BlockWeights) -> Probes:
        """The surrogate's own, with the case's blocks, which need not be equally long."""
        channels, _, height, width = self.x.shape[1:]
        recipe = GeneratorRecipe(
            "golden", self.block_frames[-1], len(self.block_frames), (channels, height, width), FewStepSchedule()
        )
        (probes,) = surrogate.probes(self.tape, recipe, Streams(0))
        per_frame = torch.tensor(weights.per_frame(self.block_frames), dtype=self.x.dtype)
        return replace(probes, extra={**probes.extra, "frame_weight": per_frame.expand(len(probes), -1)})

    def judge(self, kind, weights: BlockWeights, form: StepWeights, velocity: Tensor) -> Objective:
        """The objective of the trained clips for velocities [N, C, F, H, W]."""
        surrogate = kind(TrainedSteps(Given(self.step[self.trained]), form))
        probes = self.probes(surrogate, weights)
        views = {"current": velocity[self.trained][:, None], "reference": self.reference[self.trained][:, None]}
        values = self.advantage[self.trained]
        active, groups = torch.ones_like(values).bool(), torch.zeros_like(values).long()
        return surrogate.loss(views, probes, Advantage(values, active, groups))


def kernel_quantities(clips: Clips) -> Iterator[tuple[str, Tensor]]:
    """Mean, std and density of each step, and what the surrogate pulls with; 0 (density: NaN) where nothing is."""
    velocity, trained = clips.velocity.clone().requires_grad_(), clips.trained
    elements = clips.x[0].numel()
    steps = [clips.grid[k] for k in clips.step.tolist()]
    mean = torch.stack([KERNEL.mean(x, v, *pair) for x, v, pair in zip(clips.x, velocity, steps, strict=True)])
    pairs = zip(clips.x, clips.reference, steps, strict=True)
    reference = torch.stack([KERNEL.mean(x, v, *pair) for x, v, pair in pairs])
    std = clips.of_step(KERNEL.std)
    yield "timestep", 1000 * clips.of_step(lambda sigma, _: sigma)
    yield "next_timestep", 1000 * clips.of_step(lambda _, following: following)
    yield "transition_mean", mean.detach()
    yield "transition_std", std
    yield "x0_prediction", x0_from_velocity(clips.x, velocity.detach(), spatial(clips.of_step(lambda sigma, _: sigma)))
    density = clips.x.new_full((len(clips.x),), torch.nan)
    for n in torch.nonzero(trained).squeeze(1).tolist():
        density[n] = gaussian_log_density(clips.following[n : n + 1], mean[n : n + 1], float(std[n])).detach()
    yield "log_prob_mean_per_clip", density

    slope = clips.of_step(lambda *pair: -KERNEL.coefficients(*pair)[1] / pair[0])
    chosen = (slope[trained, None], std[trained, None])
    pull = score_pull(clips.advantage[trained], clips.following[trained, None], mean[trained, None], *chosen)
    yield "score_grad", clips.spread(pull[:, 0].detach())
    yield "timestep_reweight", clips.of_step(lambda *pair: ReleasedReweight().weight(KERNEL, *pair))

    apart = kernel_divergence(mean[trained, None], reference[trained, None], std[trained, None])[:, 0]
    yield "kl_closed_form_per_clip_sum", clips.spread(elements * apart.detach())
    yield "kl_grad_velocity_per_element_sum", torch.autograd.grad(elements * apart.sum(), velocity)[0]

    asked = clips.velocity.clone().requires_grad_()
    reinforce = clips.judge(GaussianReinforce, Uniform(), PlainSteps(), asked).per_clip.sum()
    yield "reinforce_grad_velocity", torch.autograd.grad(elements * reinforce, asked)[0]


def spatial(values: Tensor) -> Tensor:
    """[N] → [N, 1, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1, 1)


# The loss


def losses(case: Case, clips: Clips) -> Iterator[tuple[str, Tensor]]:
    """loss.weights_ALPHA.FORM.*, for whatever weights and forms the case has."""
    names = {m[0]: (m[1], m[2]) for name in case.tensors
             if (m := re.match(r"loss\.weights_(none|-?[\d.]+)\.(plain|reweighted)(?=\.)", name))}  # fmt: skip
    scale, beta, count = case.hparam("policy_loss_scaling"), case.hparam("beta"), len(clips.x)
    for label, (alpha, form) in names.items():
        weights = Uniform() if alpha == "none" else FutureParticipation(float(alpha))
        velocity = clips.velocity.clone().requires_grad_()
        objective = clips.judge(GaussianRegression, weights, FORMS[form], velocity)
        # the release divides by all clips of the step, trained or not; w has mean 1, so that is N elements
        policy = objective.per_clip.sum() / count
        total = scale * policy
        quantities = {
            "policy": policy.detach(),
            "total": total.detach(),
            "grad_velocity": torch.autograd.grad(total, velocity, retain_graph=True)[0],
        }
        if f"{label}.kl_regression" in case.tensors:
            # its value is the regression's, its gradient that of the closed form
            kl = kl_regression(clips, weights)
            penalty = KernelKL(beta).penalty(objective, None).sum() / count
            quantities |= {
                "kl_regression": kl,
                "total_with_kl": total.detach() + beta * kl,
                "grad_velocity_with_kl": torch.autograd.grad(total + penalty, velocity)[0],
            }
        yield from ((f"{label}.{name}", value) for name, value in quantities.items())


def kl_regression(clips: Clips, weights: BlockWeights) -> Tensor:
    """⟨w (x̂0 − sg[x̂0 − g])²⟩ with g = s (μ − μ_ref) / (2 std²): the regression of a sample at μ with A = −1."""
    trained = clips.trained
    of_x, of_velocity = (clips.of_step(lambda *pair, i=i: KERNEL.coefficients(*pair)[i])[trained] for i in (0, 1))
    sigma, std = (clips.of_step(value)[trained] for value in (lambda sigma, _: sigma, KERNEL.std))
    x, current, reference = (t[trained, None] for t in (clips.x, clips.velocity, clips.reference))
    mean, towards = (spatial(of_x)[:, None] * x + spatial(of_velocity)[:, None] * v for v in (current, reference))
    pull = score_pull(-torch.ones_like(std), mean, towards, -(of_velocity / sigma)[:, None], std[:, None])
    x0 = x0_from_velocity(x, current, spatial(sigma)[:, None])
    per_frame = torch.tensor(weights.per_frame(clips.block_frames), dtype=x.dtype)[:, None, None]
    return (per_frame * x0_regression(x0, pull)).flatten(1).mean(1).sum() / len(clips.x)
