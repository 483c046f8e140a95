"""The advantage of RAVEN's CM-GRPO (2605.15190): every reward on its own scale, and their sum on its own scale again.

    z_k = (r_k − mean) / (max(std_k, floor) + eps)        over the members of the group, population std
    S   = Σ_k w_k z_k / Σ_k |w_k|
    A   = clip((S − mean) / (max(std(S), floor) + eps))   over the group

The paper normalises over the group. The release takes z_k over the clips that one rank happened to make (4 of 32) and A
over the group: a throughput setting then moves advantages, and signs, of the same clips (`normalize_then_sum` with
subgroups). Here z_k is over all members, wherever they were made.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from framework.advantages import centre, finish, floored, group_std, resolve_weights, weighted_sum, widened
from framework.interfaces import AdvantageRule
from framework.types import Advantage, Scores

STD_FLOOR, STD_EPS = 1e-4, 1e-5
"""The constants of the release."""


def z_score(
    values: Tensor, groups: Tensor, floor: float = STD_FLOOR, eps: float = STD_EPS, valid: Tensor | None = None
) -> Tensor:
    """(r − mean of its group) / (max(population std of its group, floor) + eps) [N]."""
    return centre(values, groups, valid) / (floored(group_std(values, groups, valid), floor) + eps)


def normalised_sum(
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    floor: float = STD_FLOOR,
    eps: float = STD_EPS,
    valid: Tensor | None = None,
) -> Tensor:
    """S = Σ_k w_k z_k / Σ_k |w_k| [N], z_k over ``groups``; rewards {name: [N]}."""
    scaled = {name: z_score(values[name], groups, floor, eps, valid) for name in weights}
    return weighted_mean(scaled, weights)


def weighted_mean(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ_k w_k r_k / Σ_k |w_k| [N]."""
    return weighted_sum(values, weights) / sum(abs(w) for w in weights.values())


def normalize_then_sum(
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    subgroups: Tensor,
    floor: float = STD_FLOOR,
    eps: float = STD_EPS,
) -> Tensor:
    """The released rule, kept for parity tests: z_k over ``subgroups`` (one rank's clips of a prompt), A over groups.

    With subgroups = groups it is the paper's.
    """
    return z_score(normalised_sum(values, weights, subgroups, floor, eps), groups, floor, eps)


def sum_then_normalize(
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    floor: float = STD_FLOOR,
    eps: float = STD_EPS,
) -> Tensor:
    """The release's other rule, kept for parity tests: z of Σ_k w_k r_k / Σ_k |w_k|; the largest raw scale decides."""
    return z_score(weighted_mean(values, weights), groups, floor, eps)


@dataclass(frozen=True)
class RavenAdvantage(AdvantageRule):
    """A = clip(z(Σ_k w_k z(r_k) / Σ_k |w_k|)), both z over the whole group.

    |A| ≤ √(G − 1) with the population std, 5.57 for the paper's G = 32, so its clip at 5 hardly ever acts. weights: per
    signal, None for 1 each. std_floor: of a reward, in its own units. std_eps: added to every deviation. score_floor:
    of S, in units of one deviation. The release has 1e-4 there too, and two such floors in a row let a spread of 1e-8,
    i.e. the rounding of equal float32 scores, pass for a preference; above .01 nothing differs.
    """

    weights: Mapping[str, float] | None = None
    std_floor: float = STD_FLOOR
    score_floor: float = 1e-2
    std_eps: float = STD_EPS
    clip: float | None = 5.0

    def __post_init__(self) -> None:
        if min(self.std_floor, self.score_floor) <= 0 or self.std_eps < 0:
            raise ValueError(
                f"RavenAdvantage.std_floor and score_floor must be positive and std_eps 0 or more, got "
                f"{self.std_floor}, {self.score_floor} and {self.std_eps}"
            )

    def __call__(self, scores: Scores, groups: Tensor, anchors: Tensor | None = None) -> Advantage:
        weights = resolve_weights(self.weights, list(scores.values))
        values, valid = widened(scores, weights, anchors)
        total = normalised_sum(values, weights, groups, self.std_floor, self.std_eps, valid)
        advantage = z_score(total, groups, self.score_floor, self.std_eps, valid)
        return finish(advantage, valid, groups, self.clip, weighted_sum(values, weights))
