"""Golden cases of kinds l5 and l6 in other sizes and settings, computed from torch.distributions and plain formulas.

They test the runner and the surrogate: nothing may be taken from the packaged files' sizes, grids or noise levels.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributions import Normal

from tests.golden.case import Case
from tests.support import normal

Pair = tuple[float, float]


def trailing_timesteps(count: int, shift: float) -> list[int]:
    """round(1000 s u / (1 + (s − 1) u)) of u = 1, 1 − 1/K, …"""
    return [round(1000 * shift * u / (1 + (shift - 1) * u)) for u in ((count - i) / count for i in range(count))]


def future_participation(alpha: float | None, frames: Sequence[int]) -> list[float]:
    """The weights written out, element mean 1."""
    if alpha is None or alpha == 0:
        return [1.0] * len(frames)
    left = [sum(frames[j:]) / sum(frames) for j in range(len(frames))]
    share = left if alpha > 0 else [left[-1] / p for p in left]
    raw = [abs(alpha) * s / (1 + (abs(alpha) - 1) * s) for s in share]
    mean = sum(w * n for w, n in zip(raw, frames, strict=True)) / sum(frames)
    return [w / mean for w in raw]


def cm_grpo_case(
    count: int, shift: float, frames: Sequence[int], steps: Sequence[int], alphas: Sequence[float | None],
    trained_steps: int, seed: int = 0,
) -> Case:  # fmt: skip
    """A case of kind l5: K steps, blocks of the given lengths, one step index per clip."""
    grid = [*trailing_timesteps(count, shift), 0]
    pairs: list[Pair] = [(t / 1000, s / 1000) for t, s in pairwise(grid)]
    n, shape = len(steps), (3, sum(frames), 2, 3)
    clip, scale, beta = 1.5, 40.0, 0.2
    advantages = 2 * normal(seed, n)
    x, velocity, reference = (normal(seed + i, n, *shape) for i in (1, 2, 3))
    velocity.requires_grad_()
    taken = [pairs[k] for k in steps]
    trained = [k < trained_steps for k in steps]
    x0 = torch.stack([x[i] - sigma * velocity[i] for i, (sigma, _) in enumerate(taken)])
    x0_ref = torch.stack([x[i] - sigma * reference[i] for i, (sigma, _) in enumerate(taken)])
    mean = torch.stack([(1 - s) * x0[i] for i, (_, s) in enumerate(taken)])
    following = mean.detach() + torch.stack([s * normal(seed + 20 + i, *shape) for i, (_, s) in enumerate(taken)])
    cut = advantages.clamp(-clip, clip)
    log_pi = [Normal(mean[i], s).log_prob(following[i]) if trained[i] else None for i, (_, s) in enumerate(taken)]
    rho = [s / (t - s) for t, s in taken]
    kl = torch.stack([
        (1 - s) ** 2 * (x0[i] - x0_ref[i]).square() / (2 * s**2) if trained[i] else 0 * x0[i]
        for i, (_, s) in enumerate(taken)
    ])  # fmt: skip
    score = [0.5 * (1 - s) * -cut[i] * (following[i] - mean[i]) / s**2 if trained[i] else 0 * x0[i]
             for i, (_, s) in enumerate(taken)]  # fmt: skip
    score_grad = torch.stack(score).detach()
    reinforce = sum(-cut[i] * density.sum() for i, density in enumerate(log_pi) if density is not None)
    tensors = {
        "x_t": x, "velocity": velocity.detach(), "velocity_ref": reference, "next_x": following,
        "step_index": torch.tensor(steps), "advantages": advantages,
        "timestep": torch.tensor([grid[k] for k in steps]), "next_timestep": torch.tensor([grid[k + 1] for k in steps]),
        "transition_mean": mean.detach(), "transition_std": float64([s for _, s in taken]),
        "x0_prediction": x0.detach(), "score_grad": score_grad,
        "log_prob_mean_per_clip": torch.stack([torch.tensor(math.nan) if d is None else d.mean() for d in log_pi]),
        "timestep_reweight": float64(rho),
        "kl_closed_form_per_clip_sum": kl.flatten(1).sum(1).detach(),
        "kl_grad_velocity_per_element_sum": gradient(kl.sum(), velocity),
        "reinforce_grad_velocity": gradient(reinforce, velocity),
    }  # fmt: skip
    for k, s in ((count, shift), (3, 2.5)):
        found = trailing_timesteps(k, s)
        following_sigma = float64([*found[1:], 0]) / 1000
        tensors |= {
            f"schedule.K{k}_shift{s:g}.timesteps": torch.tensor(found),
            f"schedule.K{k}_shift{s:g}.sigma_next": following_sigma,
            f"schedule.K{k}_shift{s:g}.alpha_next": 1 - following_sigma,
        }
    for alpha in alphas:
        label = "none" if alpha is None else f"{alpha:g}"
        weights = future_participation(alpha, frames)
        if alpha is not None:
            tensors[f"chunk_weights.{label}"] = float64(weights)
            tensors[f"chunk_weights_table.first2_then1x3.{label}"] = float64(future_participation(alpha, [2, 1, 1, 1]))
        tensors |= weighted(label, weights, frames, x0, score_grad, kl, rho, velocity, scale, beta)
    hparams = {
        "grid": grid, "clips": n, "chunk_frames": list(frames), "adv_clip_max": clip, "policy_loss_scaling": scale,
        "beta": beta, "trained_steps": trained_steps, "chunk_weight_alphas": [str(a) for a in alphas],
        "elements_per_chunk": [3 * 2 * 3 * f for f in frames],
    }  # fmt: skip
    return Case("l5_synthetic", hparams, {name: tensor.detach() for name, tensor in tensors.items()})


def weighted(
    label: str, weights: Sequence[float], frames: Sequence[int], x0: Tensor, score: Tensor, kl: Tensor,
    rho: Sequence[float], velocity: Tensor, scale: float, beta: float,
) -> dict[str, Tensor]:  # fmt: skip
    """loss.weights_LABEL.*: sums over clips, blocks and elements divided by the sum of the weights of all elements."""
    per_element = torch.cat([torch.full((f,), w, dtype=torch.float64) for f, w in zip(frames, weights, strict=True)])
    w = per_element[None, None, :, None, None].expand_as(x0)
    tensors = {}
    for form in ("plain", "reweighted"):
        factor = float64(rho if form == "reweighted" else [1.0] * len(rho)).view(-1, 1, 1, 1, 1)
        policy = (w * factor * (x0 - (x0 - score).detach()).square()).sum() / w.sum()
        name = f"loss.weights_{label}.{form}"
        tensors |= {f"{name}.policy": policy, f"{name}.total": scale * policy}
        tensors[f"{name}.grad_velocity"] = gradient(scale * policy, velocity)
        if form == "plain":
            (slope,) = torch.autograd.grad(kl.sum(), x0, retain_graph=True)
            regression = (w * (slope / 2).square()).sum() / w.sum()
            tensors[f"{name}.kl_regression"] = regression
            tensors[f"{name}.total_with_kl"] = scale * policy + beta * regression
            both = scale * policy + beta * (w * kl).sum() / w.sum()
            tensors[f"{name}.grad_velocity_with_kl"] = gradient(both, velocity)
    return tensors


def float64(numbers: float | Sequence[float]) -> Tensor:
    """Python numbers as they are."""
    return torch.tensor(numbers, dtype=torch.float64)


def gradient(value: Tensor, at: Tensor) -> Tensor:
    """d value / d at, the graph kept."""
    return torch.autograd.grad(value, at, retain_graph=True)[0]


def euler_maruyama_case(sigmas: Sequence[float], levels: Sequence[float], batch: int = 3, seed: int = 0) -> Case:
    """A case of kind l6 on any grid; the singular σ = 1 takes the second level."""
    steps, shape = len(sigmas) - 1, (batch, 2, 3)
    x, velocity, reference, noise = (normal(seed + i, steps, *shape) for i in range(4))
    tensors = {"sigmas": float64(sigmas), "x_t": x, "velocity": velocity, "velocity_ref": reference,
               "noise": noise}  # fmt: skip
    for a in levels:
        rows: dict[str, list[Tensor]] = {}
        for k, (sigma, following) in enumerate(pairwise(sigmas)):
            dt = following - sigma
            s = a * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
            v = velocity[k].clone().requires_grad_()
            towards_x, towards_v = 1 + s**2 / (2 * sigma) * dt, (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
            mean, reference_mean = (towards_x * x[k] + towards_v * w for w in (v, reference[k]))
            std = s * math.sqrt(-dt)
            drawn = (mean + std * noise[k]).detach()
            density = Normal(mean, std).log_prob(drawn).flatten(1).mean(1)
            apart = (mean - reference_mean).square().flatten(1).mean(1)
            row = {
                "mean": mean, "std": float64([s, std]), "next": drawn, "log_prob": density,
                "grad_log_prob_velocity": gradient(density.sum(), v),
                "kl": torch.stack([apart / (2 * s**2), apart / (2 * s**2 * -dt)]),
            }  # fmt: skip
            for name, value in row.items():
                rows.setdefault(name, []).append(value.detach())
        tensors |= {f"a{a}.{name}": torch.stack(values) for name, values in rows.items()}
        for label, last in (("raven_sigma_max", sigmas[1]), ("default_sigma_max_one", 1 - 1e-6)):
            drop = sigmas[0] - sigmas[1]
            ratio = 1 + 1 / (1 - last) if sigmas[0] == 1 else sigmas[0] / (1 - sigmas[0])
            std = a * math.sqrt(ratio * drop)
            tensors[f"a{a}.{label}.step0_std"] = float64(std)
            mean = x[0] - drop * (velocity[0] + a**2 * ratio / (2 * sigmas[0]) * (x[0] + (1 - sigmas[0]) * velocity[0]))
            if label == "raven_sigma_max":
                tensors[f"a{a}.{label}.step0_mean"] = mean
            else:
                tensors[f"a{a}.{label}.step0_mean_rms"] = mean.square().mean().sqrt()
    return Case("l6_synthetic", {"sigmas": list(sigmas), "noise_levels": list(levels), "batch": batch}, tensors)
