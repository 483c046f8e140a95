"""The promises of a `SurrogatePolicy`: it measures clip by clip, couples siblings only if it says so, and can learn."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from framework.compatibility import missing_records
from framework.conformance.running import (
    FIRST_GROUP,
    SCENES,
    ask,
    check_rows,
    described,
    equal,
    make_advantage,
    make_tape,
    make_views,
    names_of,
    near,
    repeatable,
    require,
)
from framework.interfaces import ExplorationStrategy, StreamingGenerator, SurrogatePolicy
from framework.policies import BEHAVIOUR, CURRENT, REFERENCE
from framework.rng import Streams
from framework.types import Advantage, Objective, Probes, Scene, Statistics, Tape, Views


def check_surrogate(
    surrogate: SurrogatePolicy,
    exploration: ExplorationStrategy,
    generator: StreamingGenerator,
    scenes: Sequence[Scene] = SCENES,
    seed: int = 0,
) -> None:
    """Probes, statistics and objective keep what they declare, and the gradient follows the advantage.

    exploration: one that writes what the surrogate reads. scenes: at least two. Raises Nonconforming.
    """
    name = described(surrogate)
    lacking = missing_records(surrogate.reads, exploration.writes())
    require(not lacking, f"{name} reads {names_of(lacking)}, which {type(exploration).__name__} does not write")
    policies = {CURRENT, BEHAVIOUR, REFERENCE}
    require(
        CURRENT in surrogate.views <= policies,
        f"{name}.views must hold {CURRENT!r} and may hold others of {sorted(policies)}, got {sorted(surrogate.views)}",
    )
    streams = Streams(seed).at("conformance", 0)
    tape = make_tape(exploration, generator, scenes, streams, surrogate.reads)
    alone = make_tape(exploration, generator, scenes[1:2], streams, surrogate.reads, first=1)
    parts = ask(surrogate, generator, tape, streams.at("probes", 0))
    require(len(parts) > 0, f"{name}.probes gives nothing to ask")
    for probes in parts:
        _check_probes(name, probes, len(tape.groups))
    _check_placement(name, tape, parts, ask(surrogate, generator, alone, streams.at("probes", 0)))
    if surrogate.fixed_probes:
        again = ask(surrogate, generator, tape, streams.at("probes", 1))
        require(equal(parts, again), f"{name}.fixed_probes is True, but another update asks elsewhere")
    learns = [_check_part(surrogate, generator, probes, make_advantage(tape)[probes.rows]) for probes in parts]
    require(any(learns), f"{name}: the gradient does not depend on the advantage, so nothing of the reward is learnt")


def _check_probes(name: str, probes: Probes, clips: int) -> None:
    """Shapes, levels and rows."""
    n, s, c, f, h, w = probes.noisy.shape if probes.noisy.ndim == 6 else (0,) * 6
    require(
        n > 0 and probes.sigma.shape == (n, s, f) and probes.clean.shape == (n, c, f, h, w),
        f"{name}.probes must give noisy [N, S, C, F, H, W], sigma [N, S, F] and clean [N, C, F, H, W], got "
        f"{list(probes.noisy.shape)}, {list(probes.sigma.shape)} and {list(probes.clean.shape)}",
    )
    inside = bool((probes.sigma >= 0).all() and (probes.sigma <= 1).all())
    require(inside, f"{name}.probes: sigma must lie in 0 … 1, where 1 is noise")
    rows = probes.rows.tolist()
    require(
        len(rows) == n == len(set(rows)) and min(rows) >= 0 and max(rows) < clips,
        f"{name}.probes: rows must say which of {clips} clips each of the {n} probed ones is, got {rows}",
    )
    require(
        n % len(probes.scenes) == 0, f"{name}.probes: {n} clips are not whole groups of {len(probes.scenes)} scenes"
    )
    for key, value in probes.extra.items():
        require(len(value) == n, f"{name}.probes: extra[{key!r}] must be [{n}, …], got {list(value.shape)}")


def _check_placement(name: str, tape: Tape, parts: Sequence[Probes], alone: Sequence[Probes]) -> None:
    """The second group is asked what it is asked when it stands alone."""
    second = [_tensors(probes, tape.groups[probes.rows.cpu()] == FIRST_GROUP + 1) for probes in parts]
    second = [tensors for tensors in second if len(tensors["sigma"])]
    single = [_tensors(probes, torch.ones(len(probes), dtype=torch.bool)) for probes in alone]
    placed = len(second) == len(single) and all(
        left.keys() == right.keys() and all(near(left[key], right[key], 1e-3) for key in left)
        for left, right in zip(second, single, strict=True)
    )
    require(
        placed,
        f"{name}.probes of a clip depend on the other clips of the step; draw what is random about it from "
        f"streams(…, group, branch)",
    )


def _tensors(probes: Probes, chosen: Tensor) -> dict[str, Tensor]:
    """What the chosen clips are asked."""
    rows = chosen.nonzero().squeeze(1).to(probes.noisy.device)
    return {key: value[rows] for key, value in {"noisy": probes.noisy, "sigma": probes.sigma, **probes.extra}.items()}


def _check_part(surrogate: SurrogatePolicy, generator: StreamingGenerator, probes: Probes, part: Advantage) -> bool:
    """Statistics, objective and gradient at one set of probes; whether the gradient depends on the advantage."""
    name = type(surrogate).__name__
    views, velocity = make_views(generator, probes, surrogate.views)
    statistics = _measure(surrogate, views, probes)
    _check_clips(surrogate, views, probes, statistics)
    objective = _judge(surrogate, statistics, part)
    _check_coupling(surrogate, statistics, part, objective)

    require(objective.per_clip.requires_grad, f"{name}: the loss has no gradient in the current policy's velocity")
    (gradient,) = torch.autograd.grad(objective.per_clip.sum(), velocity)
    require(bool(torch.isfinite(gradient).all()), f"{name}: the loss has a gradient that is not finite")
    contrary = surrogate.objective(surrogate.statistics(views, probes), replace(part, values=-part.values))
    (other,) = torch.autograd.grad(contrary.per_clip.sum(), velocity)

    compared, _ = make_views(generator, probes, surrogate.views | {REFERENCE})
    written = frozenset(surrogate.objective(surrogate.statistics(compared, probes), part).written)
    require(
        written == surrogate.writes,
        f"{name}.writes names {names_of(surrogate.writes)}, but where the reference was asked too its objective writes "
        f"{names_of(written)}",
    )
    return float((gradient - other).norm()) > 1e-3 * float(gradient.norm())


def _measure(surrogate: SurrogatePolicy, views: Views, probes: Probes) -> Statistics:
    """`statistics`, with what it reads and leaves of the views."""
    name = type(surrogate).__name__
    before = {key: view.detach().clone() for key, view in views.items()}
    watched = _Watched(name, views)
    statistics = repeatable(f"{name}.statistics", lambda: surrogate.statistics(watched, probes))
    unread = sorted(surrogate.views - watched.read)
    require(not unread, f"{name}.views declares {unread}, which statistics never reads; each costs a forward pass")
    require(all(torch.equal(before[key], views[key]) for key in views), f"{name}.statistics changes the views in place")
    for key, value in statistics.items():
        check_rows(f"{name}.statistics[{key!r}]", value, len(probes), flat=False)
    return statistics


class _Watched(Mapping[str, Tensor]):
    """Views that remember which of them were read and refuse those that were not declared."""

    def __init__(self, name: str, views: Views) -> None:
        self.name, self.views, self.read = name, views, set[str]()

    def __getitem__(self, key: str) -> Tensor:
        require(key in self.views, f"{self.name}.statistics reads the view {key!r}; declare it in {self.name}.views")
        self.read.add(key)
        return self.views[key]

    def __contains__(self, key: object) -> bool:
        return key in self.views

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)


def _judge(surrogate: SurrogatePolicy, statistics: Statistics, part: Advantage) -> Objective:
    """`objective`, with its shapes."""
    name, n = type(surrogate).__name__, len(part.values)
    objective = repeatable(f"{name}.objective", lambda: surrogate.objective(statistics, part))
    check_rows(f"{name}.objective: per_clip", objective.per_clip, n)
    for key, value in objective.metrics.items():
        check_rows(f"{name}.objective: metrics[{key!r}]", value, n)
    require(
        surrogate.has_ratio == ("ratio_mean" in objective.metrics),
        f"{name}.has_ratio={surrogate.has_ratio}, and its metrics are {sorted(objective.metrics)}; a surrogate with a "
        f"ratio logs it as ratio_mean",
    )
    return objective


def _check_clips(surrogate: SurrogatePolicy, views: Views, probes: Probes, statistics: Statistics) -> None:
    """A clip's statistics are the same in a micro-batch of its own."""
    for i, part in enumerate(probes.split(1)):
        own = surrogate.statistics({key: view[i : i + 1] for key, view in views.items()}, part)
        require(
            own.keys() == statistics.keys() and all(near(own[k], statistics[k][i : i + 1], 1e-4) for k in own),
            f"{type(surrogate).__name__}.statistics of a clip depend on the other clips of its micro-batch; clips may "
            f"meet in `objective` only",
        )


def _check_coupling(surrogate: SurrogatePolicy, statistics: Statistics, part: Advantage, whole: Objective) -> None:
    """A clip's loss depends on no other clip, or, where that is declared, on none of another group."""
    name, n = type(surrogate).__name__, len(part.values)
    groups = [part.groups == group for group in part.groups.unique()]
    for rows in groups if surrogate.coupled else torch.eye(n, dtype=torch.bool):
        own = surrogate.objective({key: value[rows] for key, value in statistics.items()}, part[rows])
        require(
            near(own.per_clip, whole.per_clip[rows], 1e-4),
            f"{name}.objective lets a clip's loss depend on clips of other groups"
            if surrogate.coupled
            else f"{name}.objective lets a clip's loss depend on other clips; set {name}.coupled = True",
        )
