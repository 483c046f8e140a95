"""Current, behaviour, reference and averaged policy: sets of values of the same parameters, used by name.

One network exists. `use` copies a set of values into it and puts the current one back; the copy is in place, so
autograd itself raises if a graph of the current policy were still waiting for its backward pass. For LoRA a set is a
few megabytes, and the initial reference (B = 0) is exactly the base.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from framework.adapters import Adaptation
from framework.averaging import WeightAverage
from framework.distributed import held
from framework.interfaces import Schedule, StreamingGenerator
from framework.types import Loss, Objective, Probes
from framework.weights import check_tensors

CURRENT, BEHAVIOUR, REFERENCE, AVERAGE = "current", "behaviour", "reference", "average"


class Policies:
    """The policies of one run.

    behaviour_decay: d(step) of behaviour ← d · behaviour + (1 − d) · current after each step; 0 is on-policy.
    average_decay: of the averaged weights that evaluation and export use; it warms up as (1 + s) / (10 + s).
    """

    def __init__(
        self,
        generator: StreamingGenerator,
        adaptation: Adaptation,
        behaviour_decay: Schedule,
        average_decay: float,
        seed: int,
    ) -> None:
        self.generator = generator
        self.adaptation = adaptation
        self.behaviour_decay = behaviour_decay
        self.average_decay = average_decay
        self._in_use: str | None = None
        self._take(adaptation.attach(generator.network, seed))

    def _take(self, parameters: dict[str, nn.Parameter]) -> None:
        """Train these; every policy starts at their values."""
        self.parameters = parameters
        self.sets = {name: WeightAverage(parameters) for name in (BEHAVIOUR, REFERENCE, AVERAGE)}
        self._current = [torch.empty_like(held(p)) for p in parameters.values()]
        self._equal = {BEHAVIOUR, REFERENCE, AVERAGE}
        """Sets that hold exactly the current values: asking them is asking the current policy."""

    def spread(self, shard: Callable[[dict[str, nn.Parameter]], dict[str, nn.Parameter]]) -> None:
        """Spread the network over the ranks, before the first step; ``shard`` returns what is trained from then on."""
        self._take(shard(self.parameters))

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run the generator under one policy. Raises KeyError for an unknown name, RuntimeError inside another `use`:
        the current values are kept aside once, and a second swap would overwrite them."""
        if self._in_use is not None:
            raise RuntimeError(f"policy {name!r} was asked for while {self._in_use!r} is in use; leave that one first")
        if name != CURRENT and name not in self.sets:
            raise KeyError(f"no policy is called {name!r}; there are {[CURRENT, *self.sets]}")
        if name == CURRENT or name in self._equal:
            yield
            return
        parameters = [held(parameter) for parameter in self.parameters.values()]
        values = [held(value) for value in self.sets[name].weights.values()]
        with torch.no_grad():
            torch._foreach_copy_(self._current, parameters)
            torch._foreach_copy_(parameters, values)
        self._in_use = name
        try:
            yield
        finally:
            self._in_use = None
            with torch.no_grad():
                torch._foreach_copy_(parameters, self._current)

    def views(
        self, names: frozenset[str], probes: Probes, frozen: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Velocities at the probes by policy name; only "current" carries a graph, and only names asked for are run.

        frozen: views of other policies at the same probes that are known already.
        """
        views: dict[str, Tensor] = {name: view for name, view in (frozen or {}).items() if name in names}
        for name in sorted(names - {CURRENT} - views.keys()):
            if name not in self._equal:
                with self.use(name), torch.no_grad():
                    views[name] = self.generator.replay(probes)
        current = self.generator.replay(probes)
        # a set that equals the current policy would give the same numbers at the price of another forward pass
        views |= {name: current.detach() for name in (names & self._equal) - views.keys()}
        return views | {CURRENT: current} if CURRENT in names else views

    def backward(
        self, loss: Loss, probes: Probes, clips: int, total: int, frozen: "FrozenViews | None" = None
    ) -> dict[str, Tensor]:
        """Accumulate the gradient of Σ_n loss_n / total in micro-batches of ``clips``; returns summed metrics / total.

        The result does not depend on ``clips``. A loss that couples clips of different micro-batches takes two passes:
        all statistics without a graph and the loss's slope at each of them, then every micro-batch again with a graph,
        pulled along its slopes (exact, the idea of GradCache, 2101.06983; replay is deterministic).
        """
        frozen = FrozenViews(reused=False) if frozen is None else frozen
        parts = list(probes.split(clips))
        if not loss.coupled or len(parts) == 1:
            sums: dict[str, Tensor] = {}
            for part in parts:
                result = loss.judge(loss.measure(self._views(loss.views, part, frozen.next()), part), part.rows)
                (result.per_clip.sum() / total).backward()
                for name, value in summed(result, total).items():
                    sums[name] = sums[name] + value if name in sums else value
            return sums

        known = [frozen.next() for _ in parts]
        with torch.no_grad():
            measured = [
                loss.measure(self._views(loss.views, part, memo), part) for part, memo in zip(parts, known, strict=True)
            ]
        joined = {name: torch.cat([m[name] for m in measured]).requires_grad_() for name in measured[0]}
        result = loss.judge(joined, torch.cat([part.rows for part in parts]))
        slopes = torch.autograd.grad(result.per_clip.sum() / total, list(joined.values()), allow_unused=True)
        first = 0
        for part, memo in zip(parts, known, strict=True):
            rows = slice(first, first + len(part))
            measured_again = loss.measure(self._views(loss.views, part, memo), part)
            pulled = [
                (value * slope[rows]).sum()
                for value, slope in zip(measured_again.values(), slopes, strict=True)
                if slope is not None and value.requires_grad
            ]
            if pulled:
                torch.stack(pulled).sum().backward()
            first += len(part)
        return summed(result, total)

    def _views(self, names: frozenset[str], probes: Probes, memo: dict[str, Tensor]) -> dict[str, Tensor]:
        """`views` that leaves what the frozen policies said in the memo."""
        views = self.views(names, probes, memo)
        memo |= {name: view for name, view in views.items() if name != CURRENT}
        return views

    def stepped(self) -> None:
        """Tell that the current policy has moved."""
        self._equal.clear()

    def advance(self, step: int) -> None:
        """After a training step: refresh the behaviour policy and the average."""
        decay = self.behaviour_decay(step)
        if not 0 <= decay <= 1:
            raise ValueError(f"train.behaviour_decay gives {decay} at step {step}; a decay lies in [0, 1]")
        self.sets[BEHAVIOUR].update(self.parameters, decay)
        self.sets[AVERAGE].update(self.parameters, min(self.average_decay, (1 + step) / (10 + step)))
        if decay == 0:
            self._equal.add(BEHAVIOUR)

    def reset_reference(self) -> None:
        """Move the reference to the current policy."""
        self.sets[REFERENCE].update(self.parameters, 0.0)
        self._equal.add(REFERENCE)

    def tensors(self) -> dict[str, Tensor]:
        """Every value of every policy, as ``policy/parameter``; not copies."""
        sets = {CURRENT: self.parameters} | {name: average.weights for name, average in self.sets.items()}
        return {f"{policy}/{name}": value for policy, values in sets.items() for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """All sets by name and parameter name, and which of them equal the current one."""
        current = {name: p.detach().clone() for name, p in self.parameters.items()}
        sets = {CURRENT: current} | {name: dict(s.weights) for name, s in self.sets.items()}
        return sets | {"equal": sorted(self._equal)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all sets. Raises KeyError for a missing one, ValueError for one of other names or shapes."""
        for name in (CURRENT, *self.sets):
            check_tensors(state[name], self.parameters, f"the saved {name} policy")
        for name, parameter in self.parameters.items():
            parameter.copy_(state[CURRENT][name])
        for name in self.sets:
            values = {key: value.to(self.parameters[key].device) for key, value in state[name].items()}
            self.sets[name].update(values, 0.0)
        self._equal = set(state["equal"])


class FrozenViews:
    """What the policies that do not move said, part by part.

    reused: keep it for the next update of the same rollout, which asks at the same places; else every part starts
    from nothing and its views are freed with it.
    """

    def __init__(self, reused: bool) -> None:
        self.reused = reused
        self._memos: list[dict[str, Tensor]] = []
        self._position = 0

    def rewind(self) -> None:
        """Start over with the first part."""
        self._position = 0

    def next(self) -> dict[str, Tensor]:
        """The memo of the next part, to be filled by whoever asks first."""
        if not self.reused:
            return {}
        if self._position == len(self._memos):
            self._memos.append({})
        self._position += 1
        return self._memos[self._position - 1]


def summed(result: Objective, total: int) -> dict[str, Tensor]:
    """Loss and metrics of an objective as Σ_n / total."""
    values = {"loss": result.per_clip, **result.metrics}
    return {name: value.detach().sum() / total for name, value in values.items()}
