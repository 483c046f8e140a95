"""How a conformance check runs a part: made-up scenes, views and advantages, two equal calls, errors of one line."""

import inspect
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from framework.data.shapes import CAPTIONS
from framework.interfaces import ExplorationStrategy, Remembering, StreamingGenerator, SurrogatePolicy
from framework.policies import BEHAVIOUR, CURRENT, REFERENCE
from framework.records import Record
from framework.rng import Streams, draw_noise
from framework.rollout import roll_out
from framework.types import Advantage, Marks, Objective, Probes, Scene, Scores, Tape

SCENES = tuple(Scene.single(str(caption)) for caption in CAPTIONS[::50])
"""Three captions of the embedded world; a generator of another world needs scenes of its own."""

FIRST_GROUP = 17
"""The groups' ids do not start at 0, so that nobody takes a place for an id."""

R = TypeVar("R")


class Nonconforming(AssertionError):
    """A part breaks a promise of its interface; the message is one line that says which one."""


def require(condition: bool, message: str) -> None:
    """Raises Nonconforming with the message unless the condition holds."""
    if not condition:
        raise Nonconforming(" ".join(message.split()))


def described(part: object) -> str:
    """The name of a part's class, once it has what `armillary list` and a configuration read of it."""
    kind = type(part)
    require(bool((kind.__doc__ or "").strip()), f"{kind.__name__} needs a docstring: `armillary list` shows its start")
    if kind.__init__ is not object.__init__:
        bare = [p.name for p in inspect.signature(kind).parameters.values() if p.annotation is inspect.Parameter.empty]
        require(not bare, f"{kind.__name__}: annotate the parameters {bare}; a configuration is checked by them")
    return kind.__name__


def repeatable(what: str, make: Callable[[], R]) -> R:
    """The result of two equal calls between which torch's global random state is another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        one = make()
        untouched = torch.equal(state, torch.get_rng_state())
        torch.manual_seed(2)
        two = make()
    require(untouched, f"{what} draws from torch's global generator; draw from named streams, see framework.rng")
    require(equal(one, two), f"{what} gives two results for the same arguments")
    return one


def saved(name: str, part: Remembering) -> dict[str, Any]:
    """What a part remembers, as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch names no single type for what it refuses
        raise Nonconforming(f"{name}.state_dict must hold plain values and tensors alone") from error


def make_tape(
    exploration: ExplorationStrategy,
    generator: StreamingGenerator,
    scenes: Sequence[Scene],
    streams: Streams,
    reads: Iterable[type[Record]],
    first: int = 0,
) -> Tape:
    """A rollout that holds the records of ``reads`` and no other. first: how many groups are left out before it."""
    groups = [FIRST_GROUP + first + i for i in range(len(scenes))]
    plans = exploration.plan(scenes, groups, generator.recipe, streams)
    wanted = tuple(reads)
    tape = roll_out(generator, plans, exploration.kernel, frozenset(wanted))
    return replace(tape, records={kind: record for kind, record in tape.records.items() if issubclass(kind, wanted)})


def ask(surrogate: SurrogatePolicy, generator: StreamingGenerator, tape: Tape, streams: Streams) -> list[Probes]:
    """All probes of a tape."""
    name = type(surrogate).__name__
    try:
        return repeatable(f"{name}.probes", lambda: list(surrogate.probes(tape, generator.recipe, streams)))
    except KeyError as error:
        raise Nonconforming(
            f"{name}.probes: {error.args[0]}; declare every record that is read in {name}.reads"
        ) from error


def make_advantage(tape: Tape) -> Advantage:
    """Another advantage for every branch, spread evenly over 1 … −1 in each group; anchors take no part."""
    values = torch.cat([torch.linspace(1, -1, len(plan.branches)) for plan in tape.plans])
    return Advantage(values.where(~tape.anchors, 0), ~tape.anchors, tape.groups)


def make_views(
    generator: StreamingGenerator, probes: Probes, names: Iterable[str], apart: float = 0.0
) -> tuple[dict[str, Tensor], Tensor]:
    """(velocities by policy name, the current one's, a leaf). The old policy is ``apart`` from the current one, the
    reference somewhat further."""
    with torch.no_grad():
        velocity = generator.replay(probes)
    away, further = draw_noise([1, 2], velocity.shape, velocity.device)
    current = (velocity + apart * away).requires_grad_()
    known = {CURRENT: current, BEHAVIOUR: velocity, REFERENCE: velocity + 0.01 * further}
    return {name: known[name] for name in names}, current


def equal(left: object, right: object) -> bool:
    """Equality through containers and dataclasses; of tensors bit for bit, NaN equal to NaN."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, Probes | Objective | Scores | Advantage | Marks | Record) and type(left) is type(right):
        return all(equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))  # pyright: ignore
    return bool(left == right)


def near(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Of one shape, and equal to a tolerance that is relative above 1 and absolute below."""
    if left.shape != right.shape:
        return False
    return torch.allclose(left.float(), right.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


def check_rows(what: str, value: Tensor, clips: int, flat: bool = True) -> None:
    """Finite, and one per clip: [N], or [N, …] where not ``flat``."""
    fits = value.shape == (clips,) if flat else value.ndim > 0 and len(value) == clips
    require(fits, f"{what} must be [{clips}{'' if flat else ', …'}], one per clip, got {list(value.shape)}")
    require(bool(torch.isfinite(value).all()), f"{what} is not finite")


def names_of(records: Iterable[type[Record]]) -> str:
    """Records by name."""
    return ", ".join(sorted(record.__name__ for record in records)) or "nothing"
