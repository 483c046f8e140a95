"""When the reference policy moves: a frozen one ends up holding back honest gains, a reset one forgets the start.

The KL that decides is the mean over the clips that pay the penalty. Averaged over the batch instead, a mask of a
twentieth of the clips would show a twentieth of it, and no threshold would ever be reached.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from framework.accounting import Scalars
from framework.policies import Policies
from framework.records import EndpointShift, Record
from framework.types import Objective


class ReferenceSchedule(ABC):
    """When the reference policy becomes the current one."""

    reads: ClassVar[frozenset[type[Record]]] = frozenset()

    @abstractmethod
    def due(self, kl: float | Tensor | None) -> bool:
        """Once after every training step: whether to move the reference now.

        kl: velocity-space KL to the reference, averaged over the clips that paid; None where no clip did.
        """

    def metrics(self) -> Mapping[str, float]:
        """Numbers to log."""
        return {}

    def state_dict(self) -> dict:
        """What `due` remembers from step to step."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} remembers nothing, but the state to load has {sorted(state)}")


class Frozen(ReferenceSchedule):
    """The initial policy, for the whole run."""

    def due(self, kl: float | Tensor | None) -> bool:
        return False


class Dynamic(ReferenceSchedule):
    """Move when an average of the KL passes a threshold, or after ``max_age`` steps: Astrolabe's (2603.17051).

    threshold: of the average; the paper gives no value. max_age: K_max. ema: weight of the past in the average
    m ← ema · m + (1 − ema) · KL, which starts anew with every reference. raised, lowered: factors of the threshold
    after a move that came within ``early`` steps, and after one that only age brought about. The release adds and
    subtracts constants; its raise drops the threshold from .15 to .05 at once, see `released_resets`.
    """

    reads: ClassVar[frozenset[type[Record]]] = frozenset({EndpointShift})

    def __init__(
        self,
        threshold: float = 0.01,
        max_age: int = 16,
        ema: float = 0.5,
        raised: float = 1.1,
        lowered: float = 0.9,
        early: int = 5,
    ) -> None:
        if threshold <= 0 or max_age < 1 or not 0 <= ema < 1:
            raise ValueError(
                f"Dynamic.threshold must be positive, max_age at least 1 and ema in [0, 1), got {threshold}, {max_age} "
                f"and {ema}"
            )
        if not raised >= 1 >= lowered > 0:
            raise ValueError(f"Dynamic.raised must be at least 1 and lowered in (0, 1], got {raised} and {lowered}")
        self.threshold = threshold
        self.max_age, self.ema, self.raised, self.lowered, self.early = max_age, ema, raised, lowered, early
        self.age = 0
        self.average = math.nan

    def due(self, kl: float | Tensor | None) -> bool:
        self.age += 1
        if kl is not None:
            past = float(kl) if math.isnan(self.average) else self.average
            self.average = self.ema * past + (1 - self.ema) * float(kl)
        far, old = self.average > self.threshold, self.age >= self.max_age  # NaN is not far
        if not (far or old):
            return False
        if not far:
            self.threshold *= self.lowered
        elif self.age < self.early:
            self.threshold *= self.raised
        self.age, self.average = 0, math.nan
        return True

    def metrics(self) -> Mapping[str, float]:
        return {"reference_age": self.age, "reference_threshold": self.threshold}

    def state_dict(self) -> dict:
        return {"age": self.age, "average": self.average, "threshold": self.threshold}

    def load_state_dict(self, state: dict) -> None:
        self.age, self.average, self.threshold = state["age"], state["average"], state["threshold"]


def shift_metrics(loss: Objective, marks: Tensor | None) -> dict[str, Tensor]:
    """Per clip [N], where a surrogate measured it: the KL to the reference, whether it is paid for, and what is paid
    for; nothing else."""
    if EndpointShift not in loss.written:
        return {}
    distance = loss.written[EndpointShift].distance
    paying = distance.new_ones(distance.shape) if marks is None else marks
    return {"kl": distance, "frac_penalised": paying, "kl_diluted": paying * distance}


def advance_reference(schedule: ReferenceSchedule, policies: Policies, metrics: Scalars) -> Scalars:
    """After a training step: move the reference when it is due → metrics. ``metrics``: those of the last update."""
    kl = None
    if "kl_diluted" in metrics and float(metrics["frac_penalised"]) > 0:
        kl = metrics["kl_diluted"] / metrics["frac_penalised"]
    reset = schedule.due(kl)
    if reset:
        policies.reset_reference()
    measured: Scalars = {} if kl is None else {"kl_penalised": kl}
    moved: Scalars = {} if isinstance(schedule, Frozen) else {"reference_reset": float(reset)}
    return measured | moved | dict(schedule.metrics())


def released_resets(
    kl: Sequence[float], threshold: float, max_age: int, adaptive: bool = True
) -> tuple[list[bool], list[float]]:
    """(whether the reference moves at the start of each epoch, the threshold in force after that) as released.

    At the start of epoch e the reference moves if the KL at the end of the last one passed the threshold or e − last >
    max_age. adaptive: then the threshold falls by .01 to no less than .1 after a move by age, and becomes at most .05
    after one within 5 epochs. Kept for parity tests.
    """
    flag, last = False, 0
    resets, thresholds = [], []
    for epoch, value in enumerate(kl):
        age = epoch - last
        reset = flag or age > max_age
        if reset:
            flag, last = False, epoch
            if adaptive and age > max_age:
                threshold = max(threshold - 0.01, 0.1)
            if adaptive and age < 5:
                threshold = min(threshold + 0.01, 0.05)
        resets.append(reset)
        thresholds.append(threshold)
        flag = flag or value > threshold
    return resets, thresholds
