"""Golden cases of KVPO of other sizes and settings than the packaged ones, by loops that follow the words of the cases.

They test the runner: it must follow a case's hyper-parameters, not the packaged files. Nothing here uses the project's
own losses; the released form is computed in x̂0, where the project weighs velocities.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.golden.case import Case
from tests.support import normal


def softmax_of(scores: Sequence[Tensor]) -> list[Tensor]:
    total = sum((score.exp() for score in scores), torch.zeros((), dtype=torch.float64))
    return [score.exp() / total for score in scores]


def clip_loss(ratios: Sequence[Tensor], advantages: Tensor, lower: float, upper: float) -> Tensor:
    """−mean of PPO's minimum, case by case."""
    terms = []
    for ratio, advantage in zip(ratios, advantages.tolist(), strict=True):
        if advantage > 0 and ratio > upper:
            terms.append(torch.tensor(upper * advantage, dtype=torch.float64))
        elif advantage < 0 and ratio < lower:
            terms.append(torch.tensor(lower * advantage, dtype=torch.float64))
        else:
            terms.append(ratio * advantage)
    return -torch.stack(terms).mean()


def kl_of(current: Sequence[Tensor], reference: Sequence[Tensor], eps: float = 0.0) -> Tensor:
    return torch.stack([p * ((p + eps).log() - q.log()) for p, q in zip(current, reference, strict=True)]).sum()


def loss_case(
    branches: int, blocks: int, steps: int, dims: int, tau: float, clip: tuple[float, float], kl_coef: float,
    grad_steps: int, floor: float, seed: int = 0,
) -> Case:  # fmt: skip
    """A case of kind l4."""
    shape = (branches, blocks, steps, dims)
    tensors = {name: normal(seed + i, *shape) for i, name in enumerate(("z", "v_target"))}
    tensors["v_old"] = tensors["v_target"] + 0.6 * normal(seed + 2, *shape)
    tensors["v_theta"] = tensors["v_old"] + 0.4 * normal(seed + 3, *shape)
    tensors["v_ref"] = tensors["v_old"] + 0.2 * normal(seed + 4, *shape)
    tensors["advantages"] = 1.5 * normal(seed + 5, branches)
    tensors["sigma"] = torch.linspace(1.0, 0.4, steps).double()
    z, target, advantages, sigma = (tensors[name] for name in ("z", "v_target", "advantages", "sigma"))
    places = [(b, k) for b in range(blocks) for k in range(steps)]
    suffixes = (("v_theta", ""), ("v_old", "_old"), ("v_ref", "_ref"))

    def energies(v: Tensor) -> list[Tensor]:
        return [sum(((v[i, b, k] - target[i, b, k]) ** 2).mean() for b, k in places) for i in range(branches)]

    def scores(v: Tensor) -> list[Tensor]:
        rows = []
        for i in range(branches):
            total = torch.zeros((), dtype=torch.float64)
            for b, k in places:
                speed = v[i, b, k] if k < grad_steps else v[i, b, k].detach()
                x0, x0_target = z[i, b, k] - sigma[k] * speed, z[i, b, k] - sigma[k] * target[i, b, k]
                total = total - ((x0_target - x0) ** 2).mean() / (2 * max(float(sigma[k]), floor) ** 2)
            rows.append(total)
        return rows

    def paper_policy(v: Tensor) -> list[Tensor]:
        return softmax_of([-energy / len(places) / tau for energy in energies(v)])

    def released_policy(v: Tensor) -> list[Tensor]:
        return softmax_of(scores(v))

    def losses(policy: Callable[[Tensor], list[Tensor]], v: Tensor, eps: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        current, old, reference = (policy(x) for x in (v, tensors["v_old"], tensors["v_ref"]))
        ratios = [p / q for p, q in zip(current, old, strict=True)]
        return clip_loss(ratios, advantages, *clip), kl_of(current, reference, eps), ratios

    def differentiated(policy: Callable[[Tensor], list[Tensor]], name: str, eps: float, weight: float):
        v = tensors[name].clone().requires_grad_()
        policy_loss, kl, _ = losses(policy, v, eps)
        loss = policy_loss + weight * kl
        return loss.detach(), torch.autograd.grad(loss, v)[0]

    out: dict[str, Tensor] = {}
    for name, suffix in suffixes:
        total = torch.stack(energies(tensors[name]))
        out |= {f"paper.energy_sum{suffix}": total, f"paper.energy_mean{suffix}": total / len(places)}
        out[f"paper.log_pi{suffix}"] = torch.stack(paper_policy(tensors[name])).log()
        out[f"released.score{suffix}"] = torch.stack(scores(tensors[name]))
    policy_loss, kl, ratios = losses(paper_policy, tensors["v_theta"], 0.0)
    out |= {"paper.loss_clip": policy_loss, "paper.kl": kl, "paper.ratio": torch.stack(ratios)}
    out["paper.loss"], out["paper.grad_v_theta"] = differentiated(paper_policy, "v_theta", 0.0, kl_coef)
    out["paper.grad_v_theta_at_old"] = differentiated(paper_policy, "v_old", 0.0, 0.0)[1]
    out["paper.gate_zero_loss"] = torch.zeros((), dtype=torch.float64)
    policy_loss, kl, ratios = losses(released_policy, tensors["v_theta"], 1e-10)
    out |= {"released.loss_clip": policy_loss, "released.kl": kl, "released.ratio": torch.stack(ratios)}
    out["released.pi"] = torch.stack(released_policy(tensors["v_theta"]))
    outside = sum(not clip[0] <= float(ratio) <= clip[1] for ratio in ratios)
    out["released.clip_fraction"] = torch.tensor(outside / branches, dtype=torch.float64)
    loss, slope = differentiated(released_policy, "v_theta", 1e-10, kl_coef)
    for gate, scale in (("1.safe", 1), ("1.unsafe", 0), ("2.safe", 1), ("2.unsafe", 0.5)):
        out[f"released.mechanism_{gate}.loss"] = scale * loss
        out[f"released.mechanism_{gate}.grad_v_theta"] = scale * slope
    hparams = {
        "branches": branches, "blocks": blocks, "steps": steps, "dims": dims, "tau": tau, "clip": list(clip),
        "kl_coef": kl_coef, "grad_steps_released": grad_steps, "sigma_floor_released": floor,
    }  # fmt: skip
    return Case("l4_synthetic", hparams, tensors | {name: value.detach() for name, value in out.items()})


def deviation(values: Sequence[float], correction: int) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - correction))


def advantage_tensors(
    branches: int, weights: Sequence[float], shares: tuple[float, float], clamp: float, losing: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict]:  # fmt: skip
    """The ``kvpo.*`` tensors of a case of kind l2 and its ``kvpo`` hyper-parameters. losing: the anchor beats all."""
    tables = {scope: normal(seed + i, len(weights), branches + 1) for i, scope in enumerate(("local", "global"))}
    if losing:
        tables = {scope: table - 9 * (torch.arange(branches + 1) < branches) for scope, table in tables.items()}
    lists = {scope: table.tolist() for scope, table in tables.items()}

    def component(row: Sequence[float]) -> list[float]:
        return [(reward - row[-1]) / (deviation(row, 1) + 1e-8) for reward in row[:-1]]

    def mixed(rows: Sequence[Sequence[float]]) -> list[float]:
        return [sum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i in range(len(rows[0]))]

    out: dict[str, object] = {"component_weights": list(weights)}
    fused: dict[str, list[list[float]]] = {"none": [], "std": [], "zscore": []}
    is_open = False
    for scope, rows in lists.items():
        components = [component(row) for row in rows]
        total = mixed(components)
        out |= {f"{scope}_components": components, scope: total}
        out |= {f"{scope}_rewards": [row[:-1] for row in rows], f"{scope}_anchor": [row[-1] for row in rows]}
        spread, mean = deviation(total, 0), sum(total) / branches
        fused["none"].append(total)
        fused["std"].append([a / (spread + 1e-8) for a in total])
        fused["zscore"].append([(a - mean) / (spread + 1e-8) for a in total])
        raw = mixed(rows)
        is_open = is_open or any(reward > raw[-1] for reward in raw[:-1])
    out["combined_raw_first"] = component(mixed(lists["local"]))
    for name, (near, far) in fused.items():
        sums = [shares[0] * a + shares[1] * b for a, b in zip(near, far, strict=True)]
        out[f"fused.{name}"] = sums
        out[f"fused_clamped.{name}"] = [min(max(a, -clamp), clamp) for a in sums]
    tensors = {f"kvpo.{name}": torch.tensor(value, dtype=torch.float64) for name, value in out.items()}
    tensors["kvpo.gate_open"] = torch.tensor([is_open])
    names = [f"signal {i}" for i in range(len(weights))]
    return tensors, {"branches": branches, "components": names, "fusion_weights": list(shares), "clamp": clamp}
