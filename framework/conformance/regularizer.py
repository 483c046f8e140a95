"""The promises of a `Regularizer`: it reads what it declares, marks only branches with a score, and can be saved."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from framework.compatibility import missing_records
from framework.conformance.running import (
    SCENES,
    Nonconforming,
    ask,
    check_rows,
    described,
    equal,
    make_advantage,
    make_tape,
    make_views,
    names_of,
    repeatable,
    require,
    saved,
)
from framework.interfaces import ExplorationStrategy, Regularizer, StreamingGenerator, SurrogatePolicy
from framework.records import Anchors
from framework.rng import Streams
from framework.types import Marks, Objective, Scene, Scores, Tape


def check_regularizer(
    regularizer: Regularizer,
    surrogate: SurrogatePolicy,
    exploration: ExplorationStrategy,
    generator: StreamingGenerator,
    scenes: Sequence[Scene] = SCENES,
    seed: int = 0,
) -> None:
    """Penalties are finite, one per clip, of what is declared; a saved and loaded regularizer goes on as it would have.

    surrogate, exploration: ones that write what the regularizer reads. Raises Nonconforming.
    """
    name = described(regularizer)
    lacking = missing_records(regularizer.reads, surrogate.writes | exploration.writes())
    require(not lacking, f"{name} reads {names_of(lacking)}, which {type(surrogate).__name__} does not write")
    streams = Streams(seed).at("conformance", 0)
    tape = make_tape(exploration, generator, scenes, streams, surrogate.reads | {Anchors})
    marks = _check_marks(regularizer, tape, seed)
    for probes in ask(surrogate, generator, tape, streams.at("probes", 0)):
        views, velocity = make_views(generator, probes, surrogate.views | regularizer.views, apart=0.05)
        objective = surrogate.objective(surrogate.statistics(views, probes), make_advantage(tape)[probes.rows])
        penalty = _penalty(regularizer, objective, None if marks is None else marks.per_clip[probes.rows.cpu()])
        check_rows(f"{name}.penalty", penalty, len(probes))
        if penalty.requires_grad:
            (gradient,) = torch.autograd.grad(penalty.sum(), velocity)
            require(bool(torch.isfinite(gradient).all()), f"{name}.penalty has a gradient that is not finite")


def _penalty(regularizer: Regularizer, objective: Objective, marks: Tensor | None) -> Tensor:
    """The penalty, of an objective that wrote nothing but what the regularizer says that it reads."""
    name, reads = type(regularizer).__name__, tuple(regularizer.reads)
    written = {kind: record for kind, record in objective.written.items() if issubclass(kind, reads)}
    try:
        return repeatable(f"{name}.penalty", lambda: regularizer.penalty(replace(objective, written=written), marks))
    except KeyError as error:
        missing = error.args[0].__name__ if isinstance(error.args[0], type) else error
        raise Nonconforming(
            f"{name}.penalty reads {missing}, which was not measured; declare the record in {name}.reads and the "
            f"policies that it compares in {name}.views"
        ) from error


def _check_marks(regularizer: Regularizer, tape: Tape, seed: int) -> Marks | None:
    """The marks of made-up scores, the first of which failed; a loaded state gives the same next ones."""
    name, n = type(regularizer).__name__, len(tape.groups)
    out = tape.anchors | (torch.arange(n) == 0)

    def prepare(part: Regularizer, step: int) -> Marks | None:
        signals = sorted(regularizer.signals) or ["reward"]
        drawn = {signal: torch.rand(n, generator=Streams(seed)(signal, step)) for signal in signals}
        scores = Scores.of({k: value.where(torch.arange(n) > 0, torch.nan) for k, value in drawn.items()})
        return part.prepare(scores, tape.groups, tape.anchors)

    marks, twin = prepare(regularizer, 0), copy.deepcopy(regularizer)
    kept = saved(name, regularizer)
    expected = prepare(regularizer, 1)
    prepare(twin, 2)  # astray, so that only what is loaded can bring it back
    twin.load_state_dict(kept)
    found = prepare(twin, 1)
    if marks is None or expected is None or found is None:
        same = marks is None and expected is None and found is None
        require(same, f"{name}.prepare must give marks always or never")
        return None
    check_rows(f"{name}.prepare: per_clip", marks.per_clip, n)
    require(bool((marks.per_clip[out] == 0).all()), f"{name}.prepare marks an anchor or a clip whose score failed")
    measured = [{k: torch.as_tensor(v) for k, v in m.metrics.items()} for m in (found, expected)]
    require(
        torch.equal(found.per_clip, expected.per_clip) and equal(*measured),
        f"{name}: after load_state_dict it goes on with other marks; save everything that `prepare` remembers",
    )
    return marks
