"""Which parts fit together: everything a part reads must have been written upstream."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from framework.interfaces import (
    AdvantageRule,
    ExplorationStrategy,
    Regularizer,
    RewardModel,
    Schedule,
    SurrogatePolicy,
)
from framework.policies import REFERENCE
from framework.records import Record
from framework.reference import ReferenceSchedule


class IncompatibleRecipe(ValueError):
    """Parts that cannot work together; the message says which record is missing, and what it means."""


def missing_records(reads: Iterable[type[Record]], written: Iterable[type[Record]]) -> list[type[Record]]:
    """What is read but never written; a subclass satisfies a requirement for its base."""
    written = tuple(written)
    return sorted((r for r in reads if not any(issubclass(w, r) for w in written)), key=lambda r: r.__name__)


@dataclass(frozen=True)
class Gap:
    """Records that a part reads and nobody before it writes; as text, the reason for a refusal in one line.

    writers: who could have written them, and what each of them does write. unasked: views without which the missing
    records are not written although somebody can.
    """

    reader: str
    missing: tuple[type[Record], ...]
    writers: tuple[tuple[str, frozenset[type[Record]]], ...]
    unasked: tuple[str, ...] = ()

    def __str__(self) -> str:
        wanted = " and ".join(f"{record.__name__} ({_meaning(record)})" for record in self.missing)
        offers = " and ".join(f"{writer} writes {_named(written)}" for writer, written in self.writers)
        remedy = f"; add {list(self.unasked)} to {self.reader}.views, and it is measured" if self.unasked else ""
        return f"{self.reader} reads {wanted}, but {offers}{remedy}"


def surrogate_gap(exploration: ExplorationStrategy, surrogate: SurrogatePolicy) -> Gap | None:
    """What a rollout lacks for the surrogate; None where they fit."""
    return _gap(surrogate, surrogate.reads, (_how(exploration), exploration.writes()))


def advantage_gap(exploration: ExplorationStrategy, advantage: AdvantageRule) -> Gap | None:
    """What a rollout lacks for the advantage rule; None where they fit."""
    return _gap(advantage, advantage.reads, (_how(exploration), exploration.writes()))


def regularizer_gap(
    exploration: ExplorationStrategy, surrogate: SurrogatePolicy, regularizer: Regularizer
) -> Gap | None:
    """What surrogate and rollout lack for the regularizer; None where they fit.

    A surrogate writes only what the views of the two of them let it measure.
    """
    asked = surrogate.views | regularizer.views
    measured = frozenset(record for record in surrogate.writes if record.views <= asked)
    learned = (type(surrogate).__name__, measured)
    gap = _gap(regularizer, regularizer.reads, learned, (_how(exploration), exploration.writes()))
    if gap is None or missing_records(gap.missing, surrogate.writes):
        return gap  # no view would help
    silent = [record for record in surrogate.writes - measured if issubclass(record, gap.missing)]
    return replace(gap, unasked=tuple(sorted(frozenset().union(*(record.views for record in silent)) - asked)))


def check_recipe(
    exploration: ExplorationStrategy, surrogate: SurrogatePolicy, advantage: AdvantageRule, regularizer: Regularizer
) -> frozenset[type[Record]]:
    """The record types a rollout has to keep. Raises IncompatibleRecipe with the reason in one line."""
    for gap in (
        surrogate_gap(exploration, surrogate),
        advantage_gap(exploration, advantage),
        regularizer_gap(exploration, surrogate, regularizer),
    ):
        if gap is not None:
            raise IncompatibleRecipe(str(gap))
    return frozenset(surrogate.reads | advantage.reads | (regularizer.reads - surrogate.writes))


def check_signals(regularizer: Regularizer, reward: RewardModel) -> None:
    """Raises IncompatibleRecipe for a reward signal that the regularizer reads and the reward does not give."""
    missing = sorted(regularizer.signals - set(reward.signals))
    if missing:
        raise IncompatibleRecipe(
            f"{type(regularizer).__name__} reads the reward signals {missing}, but {type(reward).__name__} gives "
            f"{list(reward.signals)}"
        )


def check_updates(
    surrogate: SurrogatePolicy, updates_per_rollout: int, behaviour_decay: Schedule, max_steps: int
) -> None:
    """Raises IncompatibleRecipe where a surrogate without a ratio would learn from clips that another policy made."""
    if not surrogate.on_policy:
        return
    lag = next((step for step in range(max_steps) if behaviour_decay(step) != 0), None)
    if updates_per_rollout > 1:
        cause = f"train.updates_per_rollout={updates_per_rollout} goes on after the first has moved it: set it to 1"
    elif lag is not None:
        cause = (
            f"train.behaviour_decay={type(behaviour_decay).__name__} gives {behaviour_decay(lag):g} at step {lag}, "
            f"from where on rollouts come from a policy that lags: set @optimization.Constant()"
        )
    else:
        return
    raise IncompatibleRecipe(
        f"{type(surrogate).__name__} has no ratio to the policy that made the clips and is biased once the trained one "
        f"is another; {cause}, or take a surrogate that has one, such as GaussianRatio"
    )


def check_reference(schedule: ReferenceSchedule, surrogate: SurrogatePolicy, regularizer: Regularizer) -> None:
    """Raises IncompatibleRecipe where the reference is to move by a distance that nobody measures."""
    missing = missing_records(schedule.reads, surrogate.writes)
    if missing or (schedule.reads and REFERENCE not in surrogate.views | regularizer.views):
        read = ", ".join(sorted(record.__name__ for record in schedule.reads))
        raise IncompatibleRecipe(
            f"the reference schedule {type(schedule).__name__} reads {read}, which {type(surrogate).__name__} with "
            f"{type(regularizer).__name__} does not measure; choose a regularizer that reads the reference's view"
        )


def _gap(part: object, reads: Iterable[type[Record]], *writers: tuple[str, frozenset[type[Record]]]) -> Gap | None:
    missing = missing_records(reads, frozenset[type[Record]]().union(*(written for _, written in writers)))
    return Gap(type(part).__name__, tuple(missing), writers) if missing else None


def _how(exploration: ExplorationStrategy) -> str:
    """An exploration and the setting that decides what it writes."""
    return f"{type(exploration).__name__} with kernel {type(exploration.kernel).__name__}"


def _meaning(record: type[Record]) -> str:
    return (record.__doc__ or "").strip().split("\n")[0].rstrip(".")


def _named(written: Iterable[type[Record]]) -> str:
    names = sorted(record.__name__ for record in written)
    return f"only {', '.join(names)}" if names else "nothing"
