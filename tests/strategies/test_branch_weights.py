"""Weights of the NFT branches: a shared one only rescales a clip, one per branch moves clips that nobody prefers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from framework.flow import add_noise, expand_sigma, velocity_target
from framework.types import Advantage, Probes, Scene
from strategies.surrogates.nft import (
    NFT,
    BranchWeights,
    PerBranch,
    Shared,
    Unweighted,
    adaptive_branch_losses,
)
from tests.support import PROMPTS, close, holds, normal, refuted

SEEDS, BETAS, SPACES = st.integers(0, 2**20), st.floats(0.1, 2.0), st.sampled_from(["v", "x0"])
CLIPS = 3
SHAPE = (CLIPS, 1, 2, 3, 2, 2)


def probes_for(seed: int) -> Probes:
    """Three clips of three frames with a level of their own each; all levels count alike."""
    x0, noise = normal(seed, *SHAPE), normal(seed + 1, *SHAPE)
    sigma = (0.2 + 0.7 * torch.rand(CLIPS, generator=torch.Generator().manual_seed(seed))).double()
    per_frame = sigma[:, None, None].expand(CLIPS, 1, 3)
    return Probes(
        noisy=add_noise(x0, noise, expand_sigma(per_frame)), sigma=per_frame, clean=x0[:, 0], start=0, prefix=None,
        scenes=tuple(map(Scene.single, PROMPTS[:CLIPS])), rows=torch.arange(CLIPS),
        extra={"target": velocity_target(x0, noise), "weight": torch.ones(CLIPS, 1, 3).double()},
    )  # fmt: skip


def gradient(
    weights: BranchWeights, seed: int, beta: float, space: str, advantage: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss per clip, its gradient, v_θ − v_old)."""
    probes = probes_for(seed)
    old = normal(seed + 2, *SHAPE)
    current = (old + normal(seed + 3, *SHAPE)).requires_grad_()
    groups = torch.zeros(CLIPS, dtype=torch.long)
    nft = NFT(beta, space=space, branch_weights=weights)
    loss = nft.loss({"current": current, "behaviour": old}, probes,
                    Advantage(advantage, torch.ones(CLIPS, dtype=torch.bool), groups)).per_clip  # fmt: skip
    (slope,) = torch.autograd.grad(loss.sum(), current)
    return loss.detach(), slope, current.detach() - old


def alignment(left: Tensor, right: Tensor) -> Tensor:
    """Cosine per clip [N]."""
    return torch.nn.functional.cosine_similarity(left.flatten(1), right.flatten(1))


def check_rescales_a_clip(weights: BranchWeights, seed: int, beta: float, space: str) -> None:
    """Loss and gradient of each clip are the unweighted ones times one positive number."""
    advantage = 3 * normal(seed + 4, CLIPS)
    loss, slope, _ = gradient(weights, seed, beta, space, advantage)
    plain_loss, plain_slope, _ = gradient(Unweighted(), seed, beta, space, advantage)
    factor = loss / plain_loss
    assert bool((factor > 0).all())
    close(slope, factor.view(-1, 1, 1, 1, 1, 1) * plain_slope, atol=1e-10)


def test_a_shared_weight_only_rescales_each_clip():
    holds(partial(check_rescales_a_clip, Shared()), SEEDS, BETAS, SPACES)


def test_the_rescaling_check_sees_a_weight_per_branch():
    refuted(partial(check_rescales_a_clip, PerBranch()), SEEDS, BETAS, SPACES)


def check_no_preference_no_pull(weights: BranchWeights, seed: int, beta: float, space: str) -> None:
    """At r = ½ a clip is drawn towards the old policy and nowhere else, wherever its endpoint lies: no blur."""
    _, slope, moved = gradient(weights, seed, beta, space, torch.zeros(CLIPS))
    if space == "x0":
        moved = moved * expand_sigma(probes_for(seed).sigma).square()
    close(alignment(slope, moved), torch.ones(CLIPS), atol=1e-9)


@pytest.mark.parametrize("weights", [Unweighted(), Shared()])
def test_a_clip_without_preference_is_not_pulled_to_its_endpoint(weights: BranchWeights):
    holds(partial(check_no_preference_no_pull, weights), SEEDS, BETAS, SPACES)


def test_a_weight_per_branch_breaks_the_cancellation():
    refuted(partial(check_no_preference_no_pull, PerBranch()), SEEDS, BETAS, SPACES)


def check_diffusion_nft(weights: BranchWeights, seed: int, beta: float) -> None:
    """In x0 space the branches are those of DiffusionNFT, mixed in velocity and measured in x0."""
    probes = probes_for(seed)
    old, current = normal(seed + 2, *SHAPE), normal(seed + 3, *SHAPE)
    nft = NFT(beta, space="x0", branch_weights=weights)
    found = nft.statistics({"current": current, "behaviour": old}, probes)
    sigma = expand_sigma(probes.sigma)
    positive, negative, _, _ = adaptive_branch_losses(current, old, probes.noisy, probes.clean[:, None], sigma, beta)
    close(found["positive"], positive, atol=1e-10)
    close(found["negative"], negative, atol=1e-10)


def test_a_weight_per_branch_is_diffusion_nfts():
    holds(partial(check_diffusion_nft, PerBranch()), SEEDS, BETAS)


@pytest.mark.parametrize("other", [Shared(), Unweighted()])
def test_the_diffusion_nft_check_sees_another_weight(other: BranchWeights):
    refuted(partial(check_diffusion_nft, other), SEEDS, BETAS)


def check_no_gradient(nft: Callable[[BranchWeights], NFT], seed: int) -> None:
    """Weights are constants: what they are made from carries no graph."""
    seen: list[bool] = []

    class Watching(BranchWeights):
        def __call__(self, plus: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(plus.requires_grad or minus.requires_grad)
            return Shared()(plus, minus)

    current = normal(seed, *SHAPE).requires_grad_()
    nft(Watching()).statistics({"current": current, "behaviour": normal(seed + 1, *SHAPE)}, probes_for(seed))
    assert seen == [False]


def test_the_weights_carry_no_gradient():
    holds(partial(check_no_gradient, lambda weights: NFT(branch_weights=weights)), SEEDS, examples=5)


def test_a_vanishing_residual_meets_the_floor():
    zero = torch.zeros(2, 3)
    assert all(bool((w == 1e-3).all()) for kind in (PerBranch, Shared) for w in kind(1e-3)(zero, zero))
    assert all(bool((w == 1).all()) for w in Unweighted()(zero, zero))
