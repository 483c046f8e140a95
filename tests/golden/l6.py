"""Kind l6: the Euler–Maruyama kernels of Flow-GRPO and RAVEN, step by step."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from framework.kernels import EulerMaruyama, FlowGRPO, RavenEulerMaruyama, gaussian_log_density
from strategies.surrogates.gaussian_kernel import kernel_divergence
from tests.golden.backbone import precision
from tests.golden.case import Case, Row, compare, scaled_difference

INPUTS: tuple[str, ...] = ("sigmas", "x_t", "velocity", "velocity_ref", "noise")
NOT_TAKEN_UP: tuple[str, ...] = ()
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
LOG_PROB_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


@dataclass(frozen=True)
class Singular(EulerMaruyama):
    """RAVEN's first step as its release leaves it: 1 − σ_max = 0, floored at 1e-6: not to be sampled with."""

    noise_level: float

    def squared_diffusion(self, sigma: float, sigma_next: float) -> float:
        return self.noise_level**2 * (1 + 1 / 1e-6 if sigma == 1 else sigma / (1 - sigma))


def check(case: Case) -> list[Row]:
    """Every noise level, in both precisions."""
    return [
        compare(case, tensor, actual, tolerance(tensor, dtype), precision(dtype), scaled_difference)
        for dtype in TOLERANCE
        for level in case.hparam("noise_levels")
        for tensor, actual in compute(case, level, dtype)
    ]


def tolerance(tensor: str, dtype: torch.dtype) -> float:
    """The singular step was recorded from a release that computes in float32."""
    if "log_prob" in tensor:
        return LOG_PROB_TOLERANCE[dtype]
    return TOLERANCE[torch.float32 if "default_sigma_max_one" in tensor else dtype]


def compute(case: Case, level: float, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every expected tensor of one noise level by name."""
    x, velocity, reference, noise = (case[name].to(dtype) for name in ("x_t", "velocity", "velocity_ref", "noise"))
    sigmas = case["sigmas"].tolist()
    pairs = list(pairwise(sigmas))
    kernel, label = FlowGRPO(level), f"a{level}"
    parts: dict[str, list[Tensor]] = {}
    for k, pair in enumerate(pairs):
        asked = velocity[k].detach().requires_grad_()
        mean, std = kernel.mean(x[k], asked, *pair), kernel.std(*pair)
        diffusion = kernel.squared_diffusion(*pair) ** 0.5
        following = kernel.step(x[k], velocity[k], *pair, noise[k])
        density = gaussian_log_density(case[f"{label}.next"][k].to(dtype), mean, std)
        towards = kernel.mean(x[k], reference[k], *pair)
        scales = [x.new_full((x.shape[1], 1), value) for value in (diffusion, std)]
        row = {
            "mean": mean.detach(),
            "std": torch.tensor([diffusion, std], dtype=dtype),
            "next": following,
            "log_prob": density.detach(),
            "grad_log_prob_velocity": torch.autograd.grad(density.sum(), asked)[0],
            "kl": torch.stack([divergence(mean.detach(), towards, scale) for scale in scales]),
        }
        for name, value in row.items():
            parts.setdefault(name, []).append(value)
    for name, values in parts.items():
        yield f"{label}.{name}", torch.stack(values)

    ravens = RavenEulerMaruyama(level)
    yield f"{label}.raven_sigma_max.step0_mean", ravens.mean(x[0], velocity[0], *pairs[0])
    yield f"{label}.raven_sigma_max.step0_std", x.new_tensor(ravens.std(*pairs[0]))
    singular = Singular(level)
    rms = singular.mean(x[0], velocity[0], *pairs[0]).square().mean().sqrt()
    yield f"{label}.default_sigma_max_one.step0_std", x.new_tensor(singular.std(*pairs[0]))
    yield f"{label}.default_sigma_max_one.step0_mean_rms", rms


def divergence(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """`kernel_divergence` of a single step [n, …] with std [n, 1] → [n]; the mean over dimensions is all it needs."""
    return kernel_divergence(*(t.reshape(len(t), 1, 1, 1, 1, -1) for t in (mean, reference)), std)[:, 0]
