"""The NFT surrogate asks at levels that the sampler visits, and its objective has the derived gradient there."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.flow import add_noise, expand_sigma, x0_from_velocity
from framework.interfaces import GeneratorRecipe
from framework.records import Endpoints, EndpointShift
from framework.rng import Streams
from framework.schedules import FewStepSchedule
from framework.types import Advantage, BranchPlan, GroupPlan, Objective, Probes, Scene, Tape
from strategies.surrogates.nft import NFT, nft_loss, preference
from tests.support import close, holds, normal, over, refuted

RECIPE = GeneratorRecipe("test", 3, 3, (2, 2, 2), FewStepSchedule())
SIGMAS = torch.tensor(RECIPE.schedule.sigmas)


# the class on a tape


def make_tape(prompts: int, branches: int, frames: int, start: int, seed: int) -> Tape:
    latents = normal(seed, prompts * branches, 2, frames, 2, 2)
    prefix = normal(seed + 1, prompts, 2, start, 2, 2) if start else None
    plans = tuple(
        GroupPlan(g, Scene.single(f"prompt {g}"), start // 3, frames // 3, 0, (BranchPlan(0),) * branches)
        for g in range(prompts)
    )
    return Tape(plans, {Endpoints: Endpoints(latents, prefix, start)})


@st.composite
def tapes(draw) -> Tape:
    return make_tape(
        draw(st.integers(1, 3)), draw(st.integers(1, 6)), 3 * draw(st.integers(1, 4)), 3 * draw(st.integers(0, 2)),
        draw(st.integers(0, 2**20)),
    )  # fmt: skip


def probed(nft: NFT, tape: Tape, seed: int = 0) -> Probes:
    (probes,) = nft.probes(tape, RECIPE, Streams(seed))
    return probes


def views_for(probes: Probes, seed: int, names=("current", "behaviour")) -> dict[str, Tensor]:
    return {name: normal(seed + i, *probes.noisy.shape) for i, name in enumerate(names)}


def advantages_for(probes: Probes, seed: int) -> Advantage:
    groups = torch.arange(len(probes)) // (len(probes) // len(probes.prompts))
    return Advantage(normal(seed, len(probes)), torch.ones(len(probes), dtype=torch.bool), groups)


def objective_gradient(nft: NFT, views: dict[str, Tensor], probes: Probes, advantage: Advantage) -> Tensor:
    current = views["current"].clone().requires_grad_()
    loss = nft.loss(views | {"current": current}, probes, advantage).per_clip.sum()
    return torch.autograd.grad(loss, current)[0]


LEVEL_WEIGHTS = (0.0, 1.0, 0.5, 2.0)


def check_objective_gradient(nft: NFT, tape: Tape, seed: int, on_policy: bool) -> None:
    """(2 w / D) [(2r − 1)(v_old − v) + β δ], w = level weight × (σ² in x0 space)."""
    probes = probed(nft, tape, seed)
    views, advantage = views_for(probes, seed), advantages_for(probes, seed + 5)
    if on_policy:
        views["current"] = views["behaviour"]
    delta, elements = views["current"] - views["behaviour"], probes.noisy[0].numel()
    table = dict(zip(SIGMAS.tolist(), LEVEL_WEIGHTS, strict=True))
    expected = torch.empty_like(delta)
    for n in range(len(probes)):
        signed = 2 * preference(advantage.values[n], nft.advantage_limit) - 1
        for s in range(probes.noisy.shape[1]):
            for f in range(probes.noisy.shape[3]):
                sigma = probes.sigma[n, s, f].item()
                weight = table[sigma] * (sigma**2 if nft.space == "x0" else 1.0)
                noise = (probes.noisy[n, s, :, f] - (1 - sigma) * probes.clean[n, :, f]) / sigma
                target = noise - probes.clean[n, :, f]
                pull = signed * (views["behaviour"][n, s, :, f] - target) + nft.beta * delta[n, s, :, f]
                expected[n, s, :, f] = 2 * weight / elements * pull
    close(objective_gradient(nft, views, probes, advantage), expected, atol=1e-7)


class Forgetful(NFT):
    """A planted error: the levels' weights are not applied."""

    def statistics(self, views, probes):
        plain = replace(probes, extra=probes.extra | {"weight": torch.ones_like(probes.extra["weight"])})
        return super().statistics(views, plain)


@pytest.mark.parametrize("space", ["v", "x0"])
def test_the_objective_has_the_derived_gradient_in_both_spaces(space: str):
    nft = NFT(beta=0.7, space=space, level_weights=LEVEL_WEIGHTS, noisy_streams=2)
    holds(partial(check_objective_gradient, nft), tapes(), st.integers(0, 1000), st.booleans(), examples=15)


@pytest.mark.parametrize("space", ["v", "x0"])
def test_the_objective_check_sees_forgotten_weights(space: str):
    nft = Forgetful(beta=0.7, space=space, level_weights=LEVEL_WEIGHTS)
    refuted(partial(check_objective_gradient, nft), tapes(), st.integers(0, 1000), st.booleans())


class Undivided(NFT):
    """A planted error: the loss is not divided by β."""

    def objective(self, statistics, advantage):
        loss = super().objective(statistics, advantage)
        return replace(loss, per_clip=loss.per_clip * self.beta)


def check_beta_is_only_proximal(kind: type[NFT], tape: Tape, seed: int, betas: tuple[float, float]) -> None:
    """At θ = old β changes no gradient; away from it the difference is the proximal pull (2 w / D) Δβ δ."""
    one, two = (kind(beta=beta) for beta in betas)
    probes = probed(one, tape, seed)
    views, advantage = views_for(probes, seed), advantages_for(probes, seed)
    delta = views["current"] - views["behaviour"]
    difference = objective_gradient(one, views, probes, advantage) - objective_gradient(two, views, probes, advantage)
    close(difference, 2 * (betas[0] - betas[1]) * delta / probes.noisy[0].numel(), atol=1e-10)
    still = views | {"current": views["behaviour"]}
    close(
        objective_gradient(one, still, probes, advantage), objective_gradient(two, still, probes, advantage), atol=1e-10
    )


BETAS = st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0))


def test_beta_changes_nothing_but_the_proximal_pull():
    holds(partial(check_beta_is_only_proximal, NFT), tapes(), st.integers(0, 1000), BETAS, examples=25)


def test_the_beta_check_sees_a_loss_that_is_not_divided():
    refuted(partial(check_beta_is_only_proximal, Undivided), tapes(), st.integers(0, 1000), BETAS)


def check_spaces_agree(x0_view: Callable[[Probes, Tensor], Tensor], tape: Tape, seed: int) -> None:
    """The loss in x0 space is the loss of x̂0 = x − σ v against x0: σ² times the velocity loss of each element."""
    probes = probed(NFT(space="x0"), tape, seed)
    views, advantage = views_for(probes, seed), advantages_for(probes, seed)
    in_x0 = NFT(space="x0").loss(views, probes, advantage).per_clip
    current, old = (x0_view(probes, views[name]) for name in ("current", "behaviour"))
    target = probes.clean.unsqueeze(1).expand_as(current)
    close(in_x0, nft_loss(current, old, target, preference(advantage.values, 5.0), 1.0), atol=1e-5)
    one_level = replace(probes, sigma=torch.full_like(probes.sigma, 0.625))
    in_v = NFT(space="v").loss(views, one_level, advantage).per_clip
    close(NFT(space="x0").loss(views, one_level, advantage).per_clip, 0.625**2 * in_v, atol=1e-12)


def test_the_x0_loss_is_sigma_squared_times_the_velocity_loss():
    def x0_of(probes: Probes, velocity: Tensor) -> Tensor:
        return x0_from_velocity(probes.noisy, velocity, expand_sigma(probes.sigma.double()))

    holds(partial(check_spaces_agree, x0_of), tapes(), st.integers(0, 1000), examples=25)


def test_the_space_check_sees_another_power_of_sigma():
    def half_way(probes: Probes, velocity: Tensor) -> Tensor:
        return x0_from_velocity(probes.noisy, velocity, expand_sigma(probes.sigma.double().sqrt()))

    refuted(partial(check_spaces_agree, half_way), tapes(), st.integers(0, 1000))


# where it asks


def check_levels(probes: Probes, weights: tuple[float, ...]) -> None:
    """Every σ is a level of the sampler with a weight; it is one per block and independent between blocks."""
    for level, weight in zip(SIGMAS.tolist(), weights, strict=True):
        here = probes.sigma == level
        assert bool(here.any()) == (weight > 0), f"level {level}"
        assert bool((probes.extra["weight"][here] == weight).all())
    assert bool(torch.isin(probes.sigma, SIGMAS).all())
    blocks = probes.sigma.unflatten(-1, (-1, RECIPE.block_frames))
    assert bool((blocks == blocks[..., :1]).all())
    drawn, used = blocks[..., 0], sum(w > 0 for w in weights)
    pairs = [(drawn[..., i] == drawn[..., j]).float().mean() for i in range(drawn.shape[-1]) for j in range(i)]
    pairs += [(drawn[:, 0] == drawn[:, 1]).float().mean(), (drawn[:-1] == drawn[1:]).float().mean()]
    assert all(abs(p - 1 / used) < 0.15 for p in pairs)  # 256 clips: more than four standard deviations


MANY = make_tape(32, 8, 9, 0, 0)


@over(st.integers(0, 10**6), st.sampled_from([(1.0, 1.0, 1.0, 1.0), LEVEL_WEIGHTS, (0.0, 1.0, 0.0, 3.0)]), examples=20)
def test_levels_are_the_samplers_one_per_block_and_independent(seed: int, weights: tuple[float, ...]):
    check_levels(probed(NFT(level_weights=weights, noisy_streams=2), MANY, seed), weights)


@pytest.mark.parametrize(
    "plant",
    [
        lambda sigma: sigma[..., :1].expand_as(sigma),  # one σ for all blocks of a stream
        lambda sigma: sigma[:1].expand_as(sigma),  # one σ for all clips
        lambda sigma: sigma.roll(1, dims=-1),  # blocks cut at other frames than the sampler's
        lambda sigma: sigma.where(sigma < 0.9375, 0.75),  # the raw list instead of the shifted one
        lambda sigma: sigma.where(sigma < 0.9375, 1.0),  # a level of weight 0
    ],
)
def test_the_level_check_sees_levels_drawn_wrong(plant):
    probes = probed(NFT(level_weights=LEVEL_WEIGHTS, noisy_streams=2), MANY)
    with pytest.raises(AssertionError):
        check_levels(replace(probes, sigma=plant(probes.sigma)), LEVEL_WEIGHTS)


@over(tapes(), st.integers(1, 3), st.booleans())
def test_the_probes_are_noised_endpoints_behind_the_clean_clip(tape: Tape, streams: int, history_grad: bool):
    probes, ends = probed(NFT(noisy_streams=streams, history_grad=history_grad), tape), tape[Endpoints]
    noise = probes.extra["target"] + ends.latents.unsqueeze(1)
    close(probes.noisy, add_noise(ends.latents.unsqueeze(1), noise, expand_sigma(probes.sigma)), atol=1e-6)
    assert probes.noisy.shape[1] == streams and probes.history_grad == history_grad
    assert probes.clean is ends.latents and probes.prefix is ends.prefix and probes.start == ends.start
    assert probes.rows.tolist() == list(range(len(ends.latents)))
    assert probes.prompts == tuple(plan.scene.prompt for plan in tape.plans)
    flat = noise.flatten(1)
    assert len({tuple(row) for row in flat.tolist()}) == len(flat)  # no two clips share their noise


def test_equal_generators_give_equal_probes():
    one, two, other = (probed(NFT(), MANY, seed) for seed in (3, 3, 4))
    assert torch.equal(one.noisy, two.noisy) and torch.equal(one.sigma, two.sigma)
    assert not torch.equal(one.noisy, other.noisy)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0,) * 4, (1.0, 1.0, 1.0, -1.0), ()])
def test_level_weights_that_do_not_fit_the_sampler_are_refused(weights):
    with pytest.raises(ValueError, match=r"NFT\.level_weights.*4 levels.*0\.9375"):
        probed(NFT(level_weights=weights), MANY)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"beta": 0.0}, "NFT.beta"),
        ({"advantage_limit": -1.0}, "NFT.advantage_limit"),
        ({"space": "eps"}, "NFT.space"),
        ({"noisy_streams": 0}, "NFT.noisy_streams"),
    ],
)
def test_meaningless_settings_are_refused_at_construction(arguments: dict, name: str):
    with pytest.raises(ValueError, match=name):
        NFT(**arguments)


# what it hands on


def test_the_reference_is_written_only_where_somebody_reads_it():
    probes = probed(NFT(), MANY)
    advantage = advantages_for(probes, 0)
    assert NFT().loss(views_for(probes, 0), probes, advantage).written == {}
    views = views_for(probes, 0, ("current", "behaviour", "reference"))
    shift = NFT().loss(views, probes, advantage).written[EndpointShift]
    close(shift.distance, (views["current"] - views["reference"]).square().flatten(1).mean(1), atol=1e-12)


def test_the_distance_to_the_old_policy_is_logged_without_a_graph():
    probes = probed(NFT(), MANY)
    views = views_for(probes, 0)
    views["current"].requires_grad_()
    distance = NFT().loss(views, probes, advantages_for(probes, 0)).metrics["distance_to_old"]
    close(distance, (views["current"] - views["behaviour"]).detach().square().flatten(1).mean(1), atol=1e-12)
    assert not distance.requires_grad


# micro-batches


Split = Callable[[Probes, int], list[Probes]]


def real_split(probes: Probes, clips: int) -> list[Probes]:
    return list(probes.split(clips))


def allowed(probes: Probes, clips: int) -> bool:
    branches = len(probes) // len(probes.prompts)
    return clips >= branches or branches % clips == 0


def check_split_keeps_everything(split: Split, tape: Tape, clips: int) -> None:
    """Joined again, the parts are the whole; every part knows the prompts and the prefix of its own clips."""
    nft = NFT(noisy_streams=2)
    whole = probed(nft, tape)
    if not allowed(whole, clips):
        return
    parts = split(whole, clips)
    for name in ("noisy", "sigma", "clean", "rows"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    for name, value in whole.extra.items():
        assert torch.equal(torch.cat([part.extra[name] for part in parts]), value)
    scenes = tape.scenes
    for part in parts:
        assert len(part) <= clips
        each = len(part) // len(part.prompts)
        assert each * len(part.prompts) == len(part)
        assert [p for p in part.prompts for _ in range(each)] == [scenes[row].prompt for row in part.rows.tolist()]
        if whole.prefix is not None:
            assert part.prefix is not None
            groups = [row * len(whole.prompts) // len(whole) for row in part.rows.tolist()]
            assert torch.equal(part.prefix.repeat_interleave(each, 0), whole.prefix[groups])


def losing_the_rest(probes: Probes, clips: int) -> list[Probes]:
    parts = list(probes.split(clips))
    return parts[:-1] if len(parts[-1]) < len(parts[0]) else parts


def with_the_first_prompts(probes: Probes, clips: int) -> list[Probes]:
    return [replace(part, scenes=probes.scenes[: len(part.scenes)]) for part in probes.split(clips)]


def test_micro_batches_lose_no_clip_and_keep_its_prompt_and_prefix():
    holds(partial(check_split_keeps_everything, real_split), tapes(), st.integers(1, 20))


@pytest.mark.parametrize("mutant", [losing_the_rest, with_the_first_prompts])
def test_the_split_check_sees_lost_clips_and_wrong_prompts(mutant: Split):
    refuted(partial(check_split_keeps_everything, mutant), tapes(), st.integers(1, 20))


def test_a_micro_batch_that_cuts_groups_unevenly_is_refused():
    with pytest.raises(ValueError, match=r"micro_batch_size=5.*8"):
        list(probed(NFT(), MANY).split(5))


def check_sum_does_not_depend_on_the_split(total: Callable[[list[Objective]], Tensor], tape: Tape, clips: int) -> None:
    nft = NFT(noisy_streams=2)
    whole = probed(nft, tape)
    if not allowed(whole, clips):
        return
    views, advantage = views_for(whole, 1), advantages_for(whole, 2)

    def objective(part: Probes) -> Objective:
        rows = part.rows
        here = advantage[rows]
        return nft.loss({name: view[rows] for name, view in views.items()}, part, here)

    in_parts = total([objective(part) for part in whole.split(clips)])
    close(in_parts, total([objective(whole)]), atol=1e-10)


def test_the_sum_of_the_objective_does_not_depend_on_the_micro_batch():
    def summed(parts: list[Objective]) -> Tensor:
        return torch.stack([part.per_clip.sum() for part in parts]).sum()

    holds(partial(check_sum_does_not_depend_on_the_split, summed), tapes(), st.integers(1, 20), examples=25)


def test_the_micro_batch_check_sees_a_mean_of_means():
    def mean_of_means(parts: list[Objective]) -> Tensor:
        return torch.stack([part.per_clip.mean() for part in parts]).mean()

    refuted(partial(check_sum_does_not_depend_on_the_split, mean_of_means), tapes(), st.integers(1, 20))
