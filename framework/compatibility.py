"""Which parts fit together: everything a part reads must have been written upstream."""

from collections.abc import Iterable

from framework.interfaces import AdvantageRule, ExplorationStrategy, Regularizer, SurrogatePolicy
from framework.records import Record


class IncompatibleRecipe(ValueError):
    """Parts that cannot work together; the message says which record is missing, and what it means."""


def missing_records(reads: Iterable[type[Record]], written: Iterable[type[Record]]) -> list[type[Record]]:
    """What is read but never written; a subclass satisfies a requirement for its base."""
    written = tuple(written)
    return sorted((r for r in reads if not any(issubclass(w, r) for w in written)), key=lambda r: r.__name__)


def check_recipe(
    exploration: ExplorationStrategy, surrogate: SurrogatePolicy, advantage: AdvantageRule, regularizer: Regularizer
) -> frozenset[type[Record]]:
    """The record types a rollout has to keep. Raises IncompatibleRecipe with the reason in one line."""
    rolled, learned = exploration.writes(), surrogate.writes
    for part, reads, written, writer in (
        (surrogate, surrogate.reads, rolled, exploration),
        (advantage, advantage.reads, rolled, exploration),
        (regularizer, regularizer.reads, rolled | learned, surrogate),
    ):
        for record in missing_records(reads, written):
            meaning = (record.__doc__ or "").strip().split("\n")[0].rstrip(".")
            raise IncompatibleRecipe(
                f"{type(part).__name__} reads {record.__name__} ({meaning}), but {type(writer).__name__} "
                f"{_how(writer)}writes only {', '.join(sorted(w.__name__ for w in written)) or 'nothing'}"
            )
    return frozenset(surrogate.reads | advantage.reads | (regularizer.reads - learned))


def _how(writer: ExplorationStrategy | SurrogatePolicy) -> str:
    """The setting that decides what an exploration writes."""
    return f"with kernel {type(writer.kernel).__name__} " if isinstance(writer, ExplorationStrategy) else ""
