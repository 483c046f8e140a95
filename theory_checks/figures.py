"""The checked results as pictures: what a residual says in one number, drawn over its whole range."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from framework.block_weights import BlockWeights, FutureParticipation, LogitNormal, Mode
from framework.kernels import Consistency, DanceGRPO, FlowGRPO, Ode, TransitionKernel
from framework.schedules import FewStepSchedule
from strategies.surrogates.gibbs_tve import log_gibbs
from theory_checks.nft_improvement import BETAS, centred_preferences, minimiser_shift
from theory_checks.toy import Mixture, mixture

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5c5c5c")
"""Okabe and Ito's palette."""
INK, MUTED, RULE, GRID = "#1f2328", "#59636e", "#d0d7de", "#eaeef2"


def panel(axes: Axes, title: str, x: str, y: str) -> None:
    """One style for all."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)
    axes.tick_params(which="both", labelsize=8, colors=MUTED, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(RULE)


def nft_improvement(figure: Figure) -> None:
    """Left: expected preference after the update, at a state and over the distribution. Right: the blur term."""
    left, right = figure.subplots(1, 2)
    data = mixture(1, 6, 3, 0.0)
    r = centred_preferences(data.weights, 3)
    betas = torch.logspace(0, 2, 60, dtype=torch.float64)
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index, sigma in enumerate((1.0, 0.5, 0.3)):
        states = (1 - sigma) * data.means[torch.arange(2000) % 6] + sigma * x
        p = data.posterior(states, sigma)
        a = (p * r).sum(1, keepdim=True)
        gains = [(p * (1 + 2 / beta * (r - a)) * r).sum(1).sub(a.squeeze(1)).mean() for beta in betas]
        left.plot(betas, gains, color=COLOURS[index], linewidth=1.8, label=f"state at σ = {sigma:g}")
    whole = [(data.tilted(1 + 2 / beta * (r - 0.5)).weights * r).sum() - 0.5 for beta in betas]
    left.plot(betas, whole, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label="tilted distribution")
    left.set_xscale("log")
    left.set_yscale("log")
    panel(left, "NFT's gain in expected preference", "β", "E[r] after − before")
    left.legend(frameon=False, fontsize=8)

    share = torch.linspace(0, 1, 41, dtype=torch.float64)
    old = torch.ones(1, 1, dtype=torch.float64)  # x_old is off the posterior mean x̄ = 0 by 1
    for index, beta in enumerate(BETAS):
        pull = [
            float(minimiser_shift(torch.ones(1, 1).double(), a.view(1), torch.zeros(1, 1).double(), old, beta))
            for a in share
        ]
        right.plot(share, pull, color=COLOURS[index], linewidth=1.8, label=f"β = {beta:g}")
    right.axhline(0, color=RULE, linewidth=1)
    right.axvline(0.5, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    right.annotate("centred", (0.5, 0.86), xytext=(5, 0), textcoords="offset points", fontsize=8, color=INK)
    panel(right, "Pull of x_old to its posterior mean", "a = E[r | x_σ]", "blur term, x_old − x̄ = 1")
    right.legend(frameon=False, fontsize=8)


def gibbs_temperature(figure: Figure) -> None:
    """Left: the policy from the lowest energy alone to uniform. Right: free energy of mixtures towards one branch."""
    left, right = figure.subplots(1, 2)
    energies = torch.tensor([0.1, 0.16, 0.3, 0.42, 0.7, 1.0], dtype=torch.float64)
    group = torch.zeros(6, dtype=torch.long), torch.ones(6, dtype=torch.bool)
    taus = torch.logspace(-2, 1.5, 120, dtype=torch.float64)
    policies = torch.stack([log_gibbs(energies[:, None], float(tau), *group).exp() for tau in taus])
    for branch, energy in enumerate(energies.tolist()):
        left.plot(taus, policies[:, branch], color=COLOURS[branch], linewidth=1.8, label=f"E = {energy:g}")
    left.axhline(1 / 6, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    left.annotate("uniform", (0.011, 1 / 6), xytext=(0, 4), textcoords="offset points", fontsize=8, color=INK)
    left.set_xscale("log")
    panel(left, "Gibbs policy of six branches", "temperature τ", "π")
    left.legend(frameon=False, fontsize=8)

    mix = torch.linspace(0, 1, 81, dtype=torch.float64)
    for index, tau in enumerate((0.05, 0.3, 2.0)):
        log_pi = log_gibbs(energies[:, None], tau, *group)
        best = torch.zeros(6, dtype=torch.float64)
        best[0] = 1
        # from uniform to π on [0, ½], from π to the lowest energy alone on [½, 1]
        paths = [(1 - 2 * t) / 6 + 2 * t * log_pi.exp() if t < 0.5 else (2 - 2 * t) * log_pi.exp() + (2 * t - 1) * best
                 for t in mix]  # fmt: skip
        excess = [float((q * (q.clamp(min=1e-300).log() - log_pi)).sum()) for q in paths]
        right.plot(mix, excess, color=COLOURS[index], linewidth=1.8, label=f"τ = {tau:g}")
    right.set_xticks([0, 0.5, 1], ["uniform", "π", "lowest E"])
    panel(right, "(F(p) − F(π))/τ = KL(p ‖ π)", "p", "nats")
    right.margins(x=0.12)
    right.legend(frameon=False, fontsize=8)


def kernel_table(figure: Figure) -> None:
    """Std of every kernel's steps, and the size of its score in x̂0, on the default grid."""
    left, right = figure.subplots(1, 2)
    grid = FewStepSchedule().transitions
    kernels: dict[str, TransitionKernel] = {
        "re-noise": Consistency(), "CPS, η = .5": Consistency(0.5), "Flow-GRPO, a = .7": FlowGRPO(0.7),
        "DanceGRPO, η = .3": DanceGRPO(0.3),
    }  # fmt: skip
    width = 0.8 / len(kernels)
    for index, (name, kernel) in enumerate(kernels.items()):
        places = [k + (index - (len(kernels) - 1) / 2) * width for k in range(len(grid))]
        stds = [kernel.std(*pair) for pair in grid]
        slopes = [abs(kernel.coefficients(*pair)[1]) / pair[0] for pair in grid]
        size = [slope / std if std else math.nan for slope, std in zip(slopes, stds, strict=True)]
        left.bar(places, stds, width, color=COLOURS[index], label=name)
        right.plot(range(len(grid)), size, color=COLOURS[index], marker="o", markersize=4, linewidth=1.6, label=name)
    steps = [f"{s:.3g} → {t:.3g}" for s, t in grid]
    for axes in (left, right):
        axes.set_xticks(range(len(grid)), steps)
    right.set_yscale("log")
    panel(left, "Std of a sampler step", "step σ → σ'", "std")
    panel(right, "Size of the score in x̂0", "step σ → σ'", "|dμ/dx̂0| / std")
    left.legend(frameon=False, fontsize=8)
    left.set_ylim(top=1.3)
    right.margins(x=0.12)


def block_weights(figure: Figure) -> None:
    """Weights of seven equal blocks by family."""
    left, right = figure.subplots(1, 2)
    families: tuple[dict[str, BlockWeights], ...] = (
        {f"α = {a:g}".replace("-", "−"): FutureParticipation(a) for a in (-2.0, -1.0, -0.5, 0.0, 1.0, 2.0)},
        {
            "logit-normal(−1, 1)": LogitNormal(-1.0), "logit-normal(0, 1)": LogitNormal(),
            "logit-normal(1, 1)": LogitNormal(1.0), "mode(1)": Mode(1.0), "mode(−1)": Mode(-1.0),
        },
    )  # fmt: skip
    for axes, chosen in zip((left, right), families, strict=True):
        for index, (name, family) in enumerate(chosen.items()):
            axes.plot(range(1, 8), family((3,) * 7), color=COLOURS[index], marker="o", markersize=4, label=name)
        axes.axhline(1, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        axes.set_xticks(range(1, 8))
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=1 if axes is left else 2)
    right.set_ylim(top=3.4)
    panel(left, "Future participation", "block", "weight, element mean 1")
    panel(right, "Densities over the clip", "block", "weight, element mean 1")


def few_steps(figure: Figure) -> None:
    """Where few steps of an exact denoiser arrive: samples of re-noise and of the ODE against the data."""
    axes = figure.subplots(1, 3, sharey=True)
    data = Mixture(
        torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
        torch.tensor([[-1.6], [0.4], [1.9]], dtype=torch.float64),
        torch.tensor([0.25, 0.3, 0.15], dtype=torch.float64),
    )
    line = torch.linspace(-3, 3, 400, dtype=torch.float64).unsqueeze(1)
    density = data.log_density(line, 0.0).exp()
    fine = FewStepSchedule(tuple(range(1000, 0, -10)), 5.0).transitions
    ways = (("re-noise, 4 steps", Consistency(), FewStepSchedule().transitions),
            ("ODE, 4 steps", Ode(), FewStepSchedule().transitions),
            ("ODE, 100 steps", Ode(), fine))  # fmt: skip
    random = torch.Generator().manual_seed(0)
    for index, (axis, (name, kernel, grid)) in enumerate(zip(axes, ways, strict=True)):
        noise = torch.randn(1 + len(grid), 20_000, 1, generator=random, dtype=torch.float64)
        found = data.sample(kernel, grid, noise)[:, 0].numpy()
        axis.hist(found, bins=90, range=(-3, 3), density=True, color=COLOURS[index], alpha=0.55, label="samples")
        axis.plot(line[:, 0], density, color=INK, linewidth=1.4, label="data")
        panel(axis, name, "x0", "density" if index == 0 else "")
    axes[0].legend(frameon=False, fontsize=8)


FIGURES: dict[str, Callable[[Figure], None]] = {
    "nft_improvement": nft_improvement,
    "gibbs_temperature": gibbs_temperature,
    "kernel_table": kernel_table,
    "block_weights": block_weights,
    "few_steps": few_steps,
}


def save_all(folder: Path) -> list[Path]:
    """Draw every figure as a PNG into a folder, which is made where it is missing; older figures are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        figure = Figure(figsize=(9.0, 3.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], facecolor="white")
    return paths
