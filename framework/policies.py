"""Current, behaviour, reference and averaged policy: sets of values of the same parameters, used by name.

One network exists. `use` copies a set of values into it and puts the current one back; the copy is in place, so
autograd itself raises if a graph of the current policy were still waiting for its backward pass. For LoRA a set is a
few megabytes, and the initial reference (B = 0) is exactly the base.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from framework.adapters import Adaptation
from framework.averaging import WeightAverage
from framework.interfaces import Schedule, StreamingGenerator
from framework.types import ObjectiveFunction, Probes

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
        self.parameters = adaptation.attach(generator.network, seed)
        self.behaviour_decay = behaviour_decay
        self.average_decay = average_decay
        self.sets = {name: WeightAverage(self.parameters) for name in (BEHAVIOUR, REFERENCE, AVERAGE)}
        self._current = [torch.empty_like(p) for p in self.parameters.values()]
        self._in_use: str | None = None
        self._equal = {BEHAVIOUR, REFERENCE, AVERAGE}
        """Sets that hold exactly the current values: asking them is asking the current policy."""

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
        parameters: list[Tensor] = list(self.parameters.values())
        values = list(self.sets[name].weights.values())
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

    def views(self, names: frozenset[str], probes: Probes) -> dict[str, Tensor]:
        """Velocities at the probes by policy name; only "current" carries a graph, and only names asked for are run."""
        views: dict[str, Tensor] = {}
        for name in sorted(names - {CURRENT}):
            if name not in self._equal:
                with self.use(name), torch.no_grad():
                    views[name] = self.generator.replay(probes)
        current = self.generator.replay(probes)
        # a set that equals the current policy would give the same numbers at the price of another forward pass
        views |= {name: current.detach() for name in names & self._equal}
        return views | {CURRENT: current} if CURRENT in names else views

    def backward(
        self, objective: ObjectiveFunction, probes: Probes, names: frozenset[str], clips: int, total: int
    ) -> dict[str, Tensor]:
        """Accumulate the gradient of Σ_n loss_n / total in micro-batches of ``clips``; returns summed metrics / total.

        The result does not depend on ``clips``: every loss here is a sum over clips.
        """
        sums: dict[str, Tensor] = {}
        for part in probes.split(clips):
            result = objective(self.views(names, part), part)
            loss = result.per_clip.sum() / total
            loss.backward()
            for name, value in {"loss": result.per_clip.detach(), **result.metrics}.items():
                sums[name] = sums.get(name, torch.zeros_like(loss)) + value.detach().sum() / total
        return sums

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

    def state_dict(self) -> dict[str, Any]:
        """All sets by name and parameter name."""
        current = {name: p.detach().clone() for name, p in self.parameters.items()}
        return {CURRENT: current} | {name: dict(s.weights) for name, s in self.sets.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore all sets; a missing one is an error."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[CURRENT][name])
        for name in self.sets:
            self.sets[name].update(state[name], 0.0)
        self._equal.clear()
