"""Kind l7: the sets that a routing plan must respect, and the exact plans of the released LongLive planner.

The released planner is written here and not in `strategies`: but for its cyclic windows nothing of it is used outside
this comparison, and its one-block shift is a defect that nobody should be able to choose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.interfaces import GeneratorRecipe
from framework.schedules import FewStepSchedule
from framework.types import Route
from strategies.exploration.causal_history_routing import (
    CausalHistoryRouting,
    cyclic_windows,
    inclusion_probability,
    is_route,
    routable,
)
from tests.golden.case import Case, Row, compare, largest_difference

INPUTS: tuple[str, ...] = ("paper.case*.history_frames", "released.sample_idx", "released.seed_context")
NOT_TAKEN_UP: tuple[str, ...] = ()
BLOCK = 3
"""Frames of a block of the released planner."""


def check(case: Case) -> list[Row]:
    """Every table of integers, exactly."""
    return [
        *(row for i in range(len(case.hparam("paper")["histories"])) for row in check_paper(case, i)),
        *check_released(case),
    ]


def exact(case: Case, tensor: str, actual: Tensor) -> Row:
    return compare(case, tensor, actual, 0.0, "exact", lambda a, b: largest_difference(a, b) if len(b) else 0.0)


# The paper's sets


def check_paper(case: Case, i: int) -> list[Row]:
    """The sets of one history, and the verdicts on its example plans."""
    settings, prefix = case.hparam("paper"), f"paper.case{i}"
    sink, count, recent, steps = (settings[name] for name in ("sink", "routed", "recent", "steps"))
    start = settings["histories"][i]
    if start != int(case[f"{prefix}.history_frames"]):
        raise ValueError(f"{case.name}: {prefix} has {int(case[f'{prefix}.history_frames'])} frames, histories {start}")
    pool = routable(start, sink, recent)
    seen = Route(pool[:count], sink, recent, 1, (True,)).visible(start)
    mask = CausalHistoryRouting(routed_frames=count, recent=recent, sink=sink).routed_steps(recipe_of(steps))
    block = len(case[f"{prefix}.current"])
    sets: Mapping[str, Sequence[float]] = {
        "allowed": pool,
        "sink": seen[:sink],
        "recent": seen[len(seen) - recent :],
        "current": range(start, start + block),
        "routed_steps": mask,
        "inclusion_probability": [inclusion_probability(len(pool), count) for _ in pool],
    }
    rows = [
        exact(case, f"{prefix}.{name}", torch.tensor(list(values), dtype=torch.float64))
        for name, values in sets.items()
    ]
    return rows + [
        verdicts(case, f"{prefix}.example_{word}", pool, count, valid)
        for word, valid in (("valid", True), ("invalid", False))
    ]


def verdicts(case: Case, tensor: str, pool: Sequence[int], count: int, valid: bool) -> Row:
    """How many of the example plans are judged wrongly; they are padded with −1."""
    plans = [[frame for frame in plan if frame >= 0] for plan in case[tensor].tolist()]
    wrong = sum(is_route(plan, pool, count) != valid for plan in plans)
    return Row(tensor, float(wrong), 0.0, "plans misjudged")


def recipe_of(steps: int) -> GeneratorRecipe:
    """A generator that samples in so many steps."""
    grid = FewStepSchedule(tuple(1000 - 1000 * k // steps for k in range(steps)))
    return GeneratorRecipe("golden", BLOCK, 1, (1, 1, 1), grid)


# The released planner


@dataclass(frozen=True)
class Planner:
    """The released settings, by their names in the case: total, first, new: frames of a video, of its first chunk and
    of the others. K: branches. X: chunks that a pivot may lie in. P: routed blocks. sink, W, cap, m: sink, window,
    resident cache and nearest frames, of which window and nearest count the current block.
    """

    total: int
    first: int
    new: int
    K: int
    seed: int
    X: int
    P: int
    sink: int
    W: int
    cap: int
    m: int

    @property
    def routed(self) -> int:
        """Frames of a route."""
        return self.W - self.sink - self.m

    def pool(self, pivot: int) -> tuple[int, int]:
        """[lo, hi): the last block of the window must still find what its first one was given in the cache."""
        lo = max(self.sink, pivot + BLOCK * (self.P - 1) - (self.cap - self.sink))
        return lo, pivot - self.m

    def eligible_pivots(self) -> list[int]:
        """First frames of the blocks that a window can start at."""
        starts = [0, *range(self.first, self.total, self.new)]
        stops = [*starts[1:], self.total]
        found = []
        for start, stop in list(zip(starts, stops, strict=True))[: self.X]:
            for pivot in range(start, stop, BLOCK):
                lo, hi = self.pool(pivot)
                if pivot >= self.W and pivot + BLOCK * self.P <= stop and hi - lo >= self.routed:
                    found.append(pivot)
        return found

    def stream(self, sample: int, context: int, offset: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 97 * sample + offset + context)

    def pivot(self, sample: int, context: int) -> int:
        pivots = self.eligible_pivots()
        return pivots[int(torch.randint(len(pivots), (1,), generator=self.stream(sample, context, 0)))]

    def planned(self, pivot: int, sample: int, context: int) -> list[tuple[int, ...]]:
        """The frames of every branch: `cyclic_windows` of one permutation."""
        pool = range(*self.pool(pivot))
        order = torch.randperm(len(pool), generator=self.stream(sample, context, 1)).tolist()
        return cyclic_windows([pool[i] for i in order], self.routed, self.K)

    def fetch_shift(self, pivot: int) -> int:
        """A planned frame's slot is computed before the current block rolls the cache: one block off from then on."""
        return BLOCK if pivot + BLOCK > self.cap else 0

    def fetched(self, pivot: int, planned: Sequence[int]) -> list[list[int]]:
        """The frames attended by each block of the window, its own included; routed ones are fetched once."""
        routed = [frame + self.fetch_shift(pivot) for frame in planned]
        stops = [pivot + BLOCK * (block + 1) for block in range(self.P)]
        return [[*range(self.sink), *routed, *range(stop - self.m, stop)] for stop in stops]


def check_released(case: Case) -> list[Row]:
    """All plans of all seeds."""
    planner = Planner(**case.hparam("released"))
    seeds = list(zip(case["released.sample_idx"].tolist(), case["released.seed_context"].tolist(), strict=True))
    pivots = [planner.pivot(*seed) for seed in seeds]
    plans = [planner.planned(pivot, *seed) for pivot, seed in zip(pivots, seeds, strict=True)]
    fetched = [[planner.fetched(pivot, frames) for frames in plan] for pivot, plan in zip(pivots, plans, strict=True)]
    tables: Mapping[str, Sequence] = {
        "eligible_pivots": planner.eligible_pivots(),
        "pivot": pivots,
        "pool": [planner.pool(pivot) for pivot in pivots],
        "planned": plans,
        "fetched": fetched,
        "fetch_shift": [planner.fetch_shift(pivot) for pivot in pivots],
    }
    return [exact(case, f"released.{name}", torch.tensor(values)) for name, values in tables.items()]
